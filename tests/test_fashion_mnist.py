"""The included Fashion-MNIST is Zalando's, bit for bit; checksums are of the original IDX files."""

import gzip
import hashlib
import io
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hatchling.builders.wheel import WheelBuilder
from PIL import Image

import fedlib
from fedlib.data import open_dataset

FOLDER = Path(fedlib.__file__).parent / "fashion_mnist"
CLASS_NAMES = [
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
"""As the features of zalando-datasets/fashion_mnist on the Hub name them."""
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
    """Images and labels in the order of the file, without Flower Datasets or fedlib."""
    table = pq.read_table(FOLDER / f"{split}-00000-of-00001.parquet")
    pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist()]
    assert {picture.mode for picture in pictures} == {"L"}
    images = np.stack([np.asarray(picture) for picture in pictures])
    return images, table["label"].to_numpy()


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
    dataset = open_dataset("fashion-mnist")
    assert (dataset.mean, dataset.std) == (0.2860, 0.3530)
    assert images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    assert list(dataset.class_names) == CLASS_NAMES


@pytest.mark.parametrize("split", SPLITS)
def test_the_datasets_library_finds_the_hubs_columns(split: str) -> None:
    rows = datasets.load_dataset(str(FOLDER), split=split)
    assert rows.features == {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=CLASS_NAMES),
    }
    images, labels = decoded(split)
    assert rows.num_rows == len(labels)
    assert np.array_equal(rows[7]["image"], images[7])


def test_the_program_makes_these_files_from_idx_files(tmp_path: Path) -> None:
    """Of the first images, in files of the originals' form."""
    program = tmp_path / "make_parquet.py"
    program.write_text((FOLDER / "make_parquet.py").read_text(encoding="utf-8"), encoding="utf-8")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (array[:100] for array in decoded(split))
        files = {
            f"{prefix}-images-idx3-ubyte.gz": struct.pack(">4I", 0x0803, 100, 28, 28)
            + images.tobytes(),
            f"{prefix}-labels-idx1-ubyte.gz": struct.pack(">2I", 0x0801, 100)
            + labels.astype(np.uint8).tobytes(),
        }
        for name, content in files.items():
            (tmp_path / name).write_bytes(gzip.compress(content))
    subprocess.run([sys.executable, program, tmp_path], check=True, capture_output=True)
    for split in SPLITS:
        name = f"{split}-00000-of-00001.parquet"
        made = pq.read_table(tmp_path / name)
        assert made.equals(pq.read_table(FOLDER / name).slice(0, 100), check_metadata=True)


def test_an_installation_has_the_images() -> None:
    files = WheelBuilder(str(FOLDER.parents[1])).recurse_included_files()
    installed = {file.distribution_path for file in files}
    names = (*(f"{split}-00000-of-00001.parquet" for split in SPLITS), "README.md")
    assert {f"fedlib/fashion_mnist/{name}" for name in names} <= installed
