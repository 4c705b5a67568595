"""The included Fashion-MNIST is Zalando's, bit for bit; checksums are of the original IDX files."""

import gzip
import hashlib
import struct
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hatchling.builders.wheel import WheelBuilder

import fedlib
import make_fashion_mnist
from fedlib.data import SHUFFLE_SEED

FOLDER = Path(fedlib.__file__).parent / "fashion_mnist"
SPLITS = {  # images; SHA-256 of all pixels; MD5 of the labels' IDX file, unpacked
    "train": (
        60_000,
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    "test": (
        10_000,
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}


@cache
def decoded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as fedlib decoded them, put back into the order of the file."""
    folder = fedlib.open_dataset("fashion-mnist").folder
    positions = datasets.Dataset.from_dict({"position": range(SPLITS[split][0])})
    order = np.argsort(positions.shuffle(seed=SHUFFLE_SEED)["position"])  # FederatedDataset's
    images, labels = (np.load(folder / f"{split}_{what}.npy") for what in ("images", "labels"))
    return images[order], labels[order]


@pytest.mark.parametrize("split", SPLITS)
def test_every_pixel_and_label_is_the_originals(split: str) -> None:
    size, pixels, labels_file = SPLITS[split]
    images, labels = decoded(split)
    assert images.shape == (size, 28, 28) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == pixels
    idx = struct.pack(">II", 0x0801, size) + labels.astype(np.uint8).tobytes()
    assert hashlib.md5(idx, usedforsecurity=False).hexdigest() == labels_file
    assert np.bincount(labels).tolist() == [size // 10] * 10


def test_first_labels_mean_and_deviation_are_those_in_the_literature() -> None:
    images, labels = decoded("train")
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    dataset = fedlib.open_dataset("fashion-mnist")
    assert (dataset.mean, dataset.std) == ((0.2860,), (0.3530,))
    assert dataset.shape == (1, 28, 28)
    assert dataset.class_names == make_fashion_mnist.CLASS_NAMES  # as the Hub spells them


def test_the_program_makes_these_files_from_idx_files(tmp_path: Path) -> None:
    """Of some images, of which it reads the originals' form and writes these bytes."""
    images, _ = decoded("test")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    idx = struct.pack(">4I", 0x0803, 100, 28, 28) + images[:100].tobytes()
    file.write_bytes(gzip.compress(idx))
    table = pq.read_table(FOLDER / "test-00000-of-00001.parquet")
    stored = [row["bytes"] for row in table["image"][:100].to_pylist()]
    assert list(map(make_fashion_mnist.png, make_fashion_mnist.read_idx(file))) == stored
    assert make_fashion_mnist.FEATURES.arrow_schema.equals(table.schema, check_metadata=True)


def test_an_installation_has_the_images() -> None:
    files = WheelBuilder(str(FOLDER.parents[1])).recurse_included_files()
    installed = {file.distribution_path for file in files}
    names = (*(f"{split}-00000-of-00001.parquet" for split in SPLITS), "README.md")
    assert {f"fedlib/fashion_mnist/{name}" for name in names} <= installed
