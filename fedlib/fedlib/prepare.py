"""Preparing a data set once: found, decoded into arrays, its labels partitioned among the nodes.

Everything lands in the cache folder: ``FEDLIB_CACHE_DIR``, or ``~/.cache/fedlib`` where that is
not set. ``datasets`` and ``flwr_datasets`` are imported here only, inside the functions, because
most processes find the cache filled and never need them.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedlib.errors import DataError, one_line

if TYPE_CHECKING:
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner

FASHION_MNIST = "fashion-mnist"
HUB_NAME = "zalando-datasets/fashion_mnist"
HUB_TIMEOUT_S = 10.0
MIN_PARTITION_SIZE = 10  # DirichletPartitioner's own default, as is the next one FederatedDataset's
SHUFFLE_SEED = 42
BATCH = 1_000
ADVICE = (
    "where fedlib is installed (pip install ./fedlib), dataset='fashion-mnist' needs no download; "
    "or set it to the absolute path of a folder in the layout of fedlib/fedlib/fashion_mnist"
)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from; as a text, its name and the place it is read from now.

    Attributes:
        name: ``fashion-mnist``, a name on the Hub, or a folder's absolute path.
        path: What ``FederatedDataset`` takes: a folder's absolute path or a name on the Hub.
        cache_folder: Where its arrays lie, or will; a folder whose files changed has another.
    """

    name: str
    path: str
    cache_folder: Path

    def __str__(self) -> str:
        if self.cache_folder.is_dir():
            return f"{self.name}, from the cache"
        if not Path(self.path).is_absolute():
            return f"{self.name}, from the Hugging Face Hub"
        return self.name if self.name == self.path else f"{self.name}, from {self.path}"


def find_source(name: str) -> Source:
    """Return where a data set comes from, without asking the network.

    Raises:
        DataError: It is neither fashion-mnist nor like a name on the Hub nor a folder of parquet
            files.
    """
    root = Path(os.environ.get("FEDLIB_CACHE_DIR") or "~/.cache/fedlib").expanduser()
    if name == FASHION_MNIST:
        return Source(name, _included_copy() or HUB_NAME, root / name)
    try:
        folder = Path(name).expanduser().resolve()
        is_folder = folder.is_dir()
        files = sorted(folder.rglob("*.parquet")) if is_folder else []
    except (OSError, RuntimeError):  # a name too long, a home of nobody
        is_folder, files = False, []
    if not is_folder and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Source(name, name, root / "hub" / name)
    if any(character in name for character in "*["):
        raise DataError(
            f"dataset: expected a folder without * and [ in its path, which the datasets library "
            f"takes for a pattern, got {name!r}; rename it"
        )
    if not files:
        came = "a folder without .parquet files" if is_folder else "no such folder"
        raise DataError(
            f"dataset: expected {FASHION_MNIST}, another data set of the Hugging Face Hub "
            f"(owner/name) or the absolute path of a folder with parquet files, "
            f"got {name!r} ({came})"
        )
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(folder), state)).encode()).hexdigest()[:16]
    return Source(str(folder), str(folder), root / f"folder-{digest}")


@cache
def _included_copy() -> str | None:
    """Return the folder of parquet files in the installed fedlib.

    Not always beside this module: ``flwr run`` sends a node the package's code without its data.
    But whatever is installed, in whichever way, is on the path as well.
    """
    folders = (Path(entry, "fedlib", "fashion_mnist") for entry in sys.path)
    return next((str(f.resolve()) for f in folders if any(f.glob("*.parquet"))), None)


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill a cache folder, whole or not at all, however many processes ask at the same time.

    Args:
        folder: The folder that should exist; if it does, nothing happens.
        build: Fills the (empty, temporary) folder that it is given.

    Raises:
        DataError: The cache cannot be written, or the disk is full.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # another process was faster
                return
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            partial.mkdir()
            try:
                build(partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"data cache {folder}: expected a writable folder with 300 MB free, got: {error}; "
            f"free some space or set FEDLIB_CACHE_DIR"
        ) from error


def dirichlet_partitioner(num_partitions: int, alpha: float, seed: int) -> "DirichletPartitioner":
    """Return Flower's partitioner by label, one partition a node, without self-balancing."""
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        num_partitions=num_partitions,
        partition_by="label",
        alpha=alpha,
        min_partition_size=MIN_PARTITION_SIZE,
        seed=seed,
    )


def load_federated(path: str, partitioner: "DirichletPartitioner | int") -> "FederatedDataset":
    """Return the ``FederatedDataset`` of a folder or a Hub name, shuffled by its own default."""
    import datasets
    from flwr_datasets import FederatedDataset

    if not Path(path).is_absolute() and not datasets.config.HF_HUB_OFFLINE:
        _ask_hub(path)
    datasets.disable_progress_bars()
    return FederatedDataset(dataset=path, partitioners={"train": partitioner}, seed=SHUFFLE_SEED)


def _ask_hub(path: str) -> None:
    """Ask the Hub once for a data set: where nobody answers, ``datasets`` asks for minutes."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # no route, no such data set, proxy, TLS, HTTP status ...
        raise DataError(
            f"dataset: expected {path} on the Hugging Face Hub, got {type(error).__name__} from "
            f"there; {ADVICE}"
        ) from error


def decode(source: Source, target: Path) -> None:
    """Write the arrays of both splits, in FederatedDataset's (shuffled) order, and info.json.

    Raises:
        DataError: The Hub does not answer, or the data set has not the splits, columns or image
            size of Fashion-MNIST.
    """
    federated, arrays = load_federated(source.path, 1), dict[str, NDArray[Any]]()
    try:
        for split in ("train", "test"):
            rows = federated.load_split(split)
            class_names = rows.features["label"].names
            batches = [
                np.stack([np.asarray(image, np.uint8) for image in batch["image"]])
                for batch in rows.iter(BATCH)  # asked for one by one, rows take half as long again
            ]
            images, labels = np.concatenate(batches), np.asarray(rows["label"][:], np.int64)
            if images.shape[1:] != (28, 28) or len(class_names) != 10:
                raise ValueError(f"{images.shape[1:]} images of {len(class_names)} classes")
            if labels.min() < 0 or labels.max() > 9 or images.min() == images.max():
                raise ValueError(f"unlabelled or empty images in split {split}")
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    except Exception as error:  # whatever datasets, pyarrow, PIL or the network come up with
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise DataError(
            f"dataset {source.name}: expected the splits train and test with columns image (28x28 "
            f"grey) and label (ten classes), got {reason}; {ADVICE}"
        ) from error
    for array_name, array in arrays.items():
        np.save(target / f"{array_name}.npy", array)
    pixels = arrays["train_images"] / np.float32(255)
    info = {
        "class_names": class_names,
        "mean": round(float(pixels.mean(dtype=np.float64)), 4),
        "std": round(float(pixels.std(dtype=np.float64)), 4),
    }
    (target / "info.json").write_text(json.dumps(info), encoding="utf-8")


def partition(arrays: Path, num_partitions: int, alpha: float, seed: int, target: Path) -> None:
    """Let Flower Datasets partition the labels, and write the positions that each node gets.

    Raises:
        DataError: The labels cannot be partitioned this way.
    """
    import datasets

    labels = np.load(arrays / "train_labels.npy")
    partitioner = dirichlet_partitioner(num_partitions, alpha, seed)
    partitioner.dataset = datasets.Dataset.from_dict(
        {"label": labels, "position": np.arange(len(labels))}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at each new attempt; the last one raises
            parts = [partitioner.load_partition(i)["position"] for i in range(num_partitions)]
    except ValueError as error:
        raise DataError(
            f"dataset: expected the {len(labels)} training examples to fill "
            f"{num_partitions} partitions with {MIN_PARTITION_SIZE} or more each at "
            f"dirichlet-alpha {alpha:g}, which did not come about; "
            f"use fewer nodes or a larger dirichlet-alpha"
        ) from error
    np.save(target / "indices.npy", np.concatenate([np.asarray(part, np.int64) for part in parts]))
    np.save(target / "offsets.npy", np.cumsum([0, *(len(part) for part in parts)]))
