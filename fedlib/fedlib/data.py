"""The data: decoded once, cached as arrays, partitioned by Flower Datasets, read by mapping.

``open_dataset`` reads a data set through ``FederatedDataset``, decodes the images once and leaves
them as ``.npy`` files in a cache folder: ``FEDLIB_CACHE_DIR``, or ``~/.cache/fedlib``.
``load_partition`` and ``load_test`` only map those files. So ``datasets`` and ``flwr_datasets``,
which take seconds, are imported inside the two functions that fill the cache.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from fedlib.config import absolute
from fedlib.errors import DataError, one_line

FASHION_MNIST = "fashion-mnist"
HUB_NAME = "zalando-datasets/fashion_mnist"
HUB_TIMEOUT_S = 10.0
VALIDATION_FRACTION = 0.2
MIN_PARTITION_SIZE = 10  # DirichletPartitioner's own default, as is the next one FederatedDataset's
SHUFFLE_SEED = 42
CACHE_VERSION = "3"  # of the files that _decode writes
MODES = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}  # Pillow's; what an image is decoded to
KINDS = {  # of columns, and how the library datasets makes one
    "Image": "files' bytes after cast_column(name, Image())",
    "ClassLabel": "integers from 0 after cast_column(name, ClassLabel(names=[...]))",
}
ADVICE = (
    "; where fedlib is installed (pip install ./fedlib), dataset='fashion-mnist' needs no "
    "download; or set it to the absolute path of a folder of parquet files"
)


@dataclass(frozen=True)
class Split:
    """Images with labels, and the constants that normalise them (see ``Dataset``)."""

    images: Tensor  # uint8, (N, H, W) if grey, else (N, H, W, C); 0 is black
    labels: Tensor  # int64, (N,), from 0
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images to float32 (N, C, H, W), each channel with mean 0 and deviation 1.

        In memory the channel comes last, and PyTorch keeps it so from layer to layer: convolution
        and pooling then take all channels of a pixel at once. On a CPU, training takes a third less
        time than with the channel first, evaluation half as much.
        """
        pixels = images.unsqueeze(-1) if images.ndim == 3 else images  # (N, H, W, C)
        mean, std = (torch.tensor(x, device=images.device) for x in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).movedim(-1, 1)


@dataclass(frozen=True)
class Partition:
    """One node's own data: 80 % to train on, 20 % to evaluate on."""

    train: Split
    validation: Split


@dataclass(frozen=True)
class Dataset:
    """A data set whose arrays lie in the cache."""

    name: str  # fashion-mnist, a name on the Hub, or a folder's absolute path
    folder: Path  # where its arrays lie
    class_names: tuple[str, ...]  # by label
    shape: tuple[int, int, int]  # channels, height and width of an image
    mean: tuple[float, ...]  # of the training pixels, one a channel (Fashion-MNIST: 0.2860)
    std: tuple[float, ...]  # their standard deviation, from 0 to 1 likewise (0.3530)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from; as a text, its name and the place it is read from now."""

    name: str  # as in Dataset
    path: str  # what FederatedDataset takes: a folder's absolute path or a name on the Hub
    cache_folder: Path  # where its arrays lie, or will; a folder whose files changed has another

    def __str__(self) -> str:
        with suppress(OSError):  # a cache that may not be entered is opened next, and refused
            if self.cache_folder.is_dir():
                return f"{self.name}, from the cache"
        if not Path(self.path).is_absolute():
            return f"{self.name}, from the Hugging Face Hub"
        return self.name if self.name == self.path else f"{self.name}, from {self.path}"


def find_source(name: str) -> Source:
    """Return where a data set comes from, without asking the network.

    Raises:
        DataError: It is neither fashion-mnist nor like a name on the Hub nor a folder of parquet
            files; or there is no home directory for the cache.
    """
    place = os.environ.get("FEDLIB_CACHE_DIR") or "~/.cache/fedlib"
    try:
        root = Path(place).expanduser() / CACHE_VERSION
    except RuntimeError as error:  # a container's user, of whom the machine knows nothing
        raise DataError(
            f"data cache {place}: expected a home directory, got none for this user; "
            f"set HOME to a folder that can be written, or both FEDLIB_CACHE_DIR and HF_HOME"
        ) from error
    if name == FASHION_MNIST:
        return Source(name, _included_copy() or HUB_NAME, root / name)
    state, is_folder = [], False
    with suppress(OSError, RuntimeError):  # a name too long, links in a circle
        folder = absolute(name)
        is_folder = folder.is_dir()
        files = sorted(folder.rglob("*.parquet")) if is_folder else []
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if state:
        digest = hashlib.sha256(repr((str(folder.resolve()), state)).encode()).hexdigest()[:16]
        return Source(str(folder), str(folder), root / f"folder-{digest}")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not is_folder:
        return Source(name, name, root / "hub" / name)
    raise DataError(
        f"dataset: expected {FASHION_MNIST}, another data set of the Hugging Face Hub (owner/name) "
        f"or the absolute path of a folder with parquet files, got {name!r}, which is none"
    )


@cache
def _included_copy() -> str | None:
    """Return the folder of parquet files in the installed fedlib.

    Not always beside this module: ``flwr run`` sends a node the package's code without its data.
    But whatever is installed, in whichever way, is on the path as well.
    """
    folders = (Path(entry, "fedlib", "fashion_mnist") for entry in sys.path)
    readable = (folder for folder in folders if os.access(folder, os.R_OK))
    return next((str(f.resolve()) for f in readable if any(f.glob("*.parquet"))), None)


def open_dataset(name: str = FASHION_MNIST) -> Dataset:
    """Return a data set, decoding it into the cache first if it is not there.

    It is ``fashion-mnist`` (the copy that fedlib brings; where there is none, the Hub's), the name
    of another data set on the Hub (``owner/name``), or a folder of parquet files.

    Raises:
        DataError: It is unknown, out of reach or unreadable; or the cache cannot be written, or is
            damaged.
    """
    return _open(find_source(name))


@lru_cache(maxsize=4)
def _open(source: Source) -> Dataset:
    folder = source.cache_folder
    _build_once(folder, lambda target: _decode(source, target))
    dataset = Dataset(source.name, folder, *_read(folder / "info.json", _info))
    for split in ("train", "test"):
        _select(dataset, split, slice(0), "cpu")  # a damaged file is found before any training
    return dataset


@lru_cache(maxsize=4)
def load_test(dataset: Dataset, device: str = "cpu") -> Split:
    """Return the test split, on which the server evaluates the global model, on a device."""
    return _select(dataset, "test", slice(None), device)


@lru_cache(maxsize=256)  # about 1 MB each with fifty nodes
def load_partition(
    dataset: Dataset,
    num_partitions: int,
    alpha: float,
    seed: int,
    partition_id: int,
    device: str = "cpu",
) -> Partition:
    """Return one node's data; a process reads and splits it once, and keeps it on the device.

    ``alpha`` is the concentration of the Dirichlet distribution of each label over the nodes: near
    0 each holds few labels, towards infinity all hold the same mixture.

    Raises:
        DataError: ``partition_id`` is out of range, or the labels cannot be partitioned this way.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition {partition_id}: expected 0 to {num_partitions - 1} "
            f"(num-partitions is {num_partitions}); mend the node's config"
        )
    indices = partition_indices(dataset, num_partitions, alpha, seed)[partition_id]  # shuffled
    num_train = len(indices) - round(VALIDATION_FRACTION * len(indices))
    parts = indices[:num_train], indices[num_train:]
    return Partition(*(_select(dataset, "train", part, device) for part in parts))


@lru_cache(maxsize=8)
def partition_indices(
    dataset: Dataset, num_partitions: int, alpha: float, seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Return each partition's positions in the training set, as Flower Datasets assigns them.

    Raises:
        DataError: The labels cannot be partitioned this way.

    Source: ``flwr_datasets.partitioner.DirichletPartitioner``, without self-balancing.
    """
    folder = dataset.folder / f"partitions-{num_partitions}-alpha-{float(alpha)!r}-seed-{seed}"
    _build_once(folder, lambda target: _partition(dataset, num_partitions, alpha, seed, target))
    indices, offsets = (_read(folder / f"{name}.npy", np.load) for name in ("indices", "offsets"))
    return tuple(np.split(indices, offsets[1:-1]))


def _select(dataset: Dataset, split: str, chosen: Any, device: str) -> Split:
    """Copy the chosen images and labels out of the mapped files."""
    files = (dataset.folder / f"{split}_{what}.npy" for what in ("images", "labels"))
    mapped = (_read(file, lambda file: np.load(file, mmap_mode="r")) for file in files)
    images, labels = (torch.from_numpy(np.array(array[chosen])).to(device) for array in mapped)
    return Split(images, labels, dataset.mean, dataset.std)


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return what a file of the cache holds.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return read(file)
    except Exception as error:  # whatever json, NumPy or the file system come up with
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise DataError(
            f"data cache {file}: expected what fedlib wrote there, got {reason}; "
            f"delete the folder {file.parent}, and it is made anew"
        ) from error


def _info(file: Path) -> list[tuple[Any, ...]]:
    """Return class names, shape, means and deviations, if they can be what ``_decode`` wrote."""
    info = json.loads(file.read_text(encoding="utf-8"))
    names, shape, mean, std = (info[key] for key in ("class_names", "shape", "mean", "std"))
    possible = {
        "class_names": type(names) is list and {*map(type, names)} == {str},
        "shape": len(shape) == 3 and all(type(size) is int and size > 0 for size in shape),
        "mean": len(mean) == shape[0] and all(0 <= value <= 1 for value in mean),
        "std": len(std) == shape[0] and all(0 < value <= 1 for value in std),  # nor is it NaN
    }
    if wrong := [f"{key}={info[key]}" for key in possible if not possible[key]]:
        raise ValueError(", ".join(wrong))
    return [tuple(values) for values in (names, shape, mean, std)]


def _build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill a cache folder, whole or not at all, however many processes ask at the same time."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        if folder.is_dir():
            return
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


def _decode(source: Source, target: Path) -> None:
    """Write the arrays of both splits, in FederatedDataset's (shuffled) order, and info.json."""
    import datasets
    import huggingface_hub
    from flwr_datasets import FederatedDataset

    datasets.disable_progress_bars()
    arrays: dict[str, NDArray[Any]] = {}
    try:
        if not Path(source.path).is_absolute() and not datasets.config.HF_HUB_OFFLINE:
            # Once: where nobody answers, datasets asks for minutes.
            huggingface_hub.HfApi().dataset_info(source.path, timeout=HUB_TIMEOUT_S)
        whole = {"train": 1}
        federated = FederatedDataset(dataset=source.path, partitioners=whole, seed=SHUFFLE_SEED)
        for split in ("train", "test"):
            rows = federated.load_split(split)
            image, label = (_column(rows, kind) for kind in KINDS)
            batches = rows.select_columns(image).iter(1_000)  # one by one takes half as long again
            images = np.concatenate([_pixels(batch[image]) for batch in batches])
            labels = np.asarray(rows[label][:], np.int64)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
            if split == "train":
                class_names, shape = rows.features[label].names, images.shape[1:]
            if (rows.features[label].names, images.shape[1:]) != (class_names, shape):
                raise ValueError(f"images of another shape or other classes in split {split}")
            if not 0 <= labels.min() <= labels.max() < len(class_names):
                raise ValueError(f"rows without a label, or of an unknown class, in split {split}")
        height, width, channels = (*shape, 1)[:3]
        mean, std = _mean_and_std(arrays["train_images"].reshape(-1, height * width, channels))
        if min(std) == 0:
            raise ValueError("a channel that is the same in all pixels")
    except Exception as error:  # whatever datasets, pyarrow, PIL or the network come up with
        advice = "" if Path(source.path).is_absolute() else ADVICE
        reason = one_line(f"{type(error).__name__}: {error}")[:300] + advice
        raise DataError(
            f"dataset {source}: expected the splits train and test with a column of images, all of "
            f"one size, and one of class labels, got {reason}"
        ) from error
    info = {"class_names": class_names, "shape": [channels, height, width], "mean": mean}
    (target / "info.json").write_text(json.dumps(info | {"std": std}), encoding="utf-8")
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)


def _pixels(pictures: list[Any]) -> NDArray[np.uint8]:
    """Return pictures as arrays, grey or RGB; those of any other mode have more in them."""
    if others := {str(getattr(picture, "mode", None)) for picture in pictures} - MODES.keys():
        raise ValueError(f"images of mode {', '.join(sorted(others))}, not of {', '.join(MODES)}")
    return np.stack([np.asarray(picture.convert(MODES[picture.mode])) for picture in pictures])


def _column(rows: Any, kind: str) -> str:
    """Return the name of the only column of a kind, such as Image."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    names: list[str] = [name for name in kinds if kinds[name] == kind]
    if len(names) != 1:
        how = f"{kind} ({KINDS[kind]})"
        raise ValueError(f"{len(names)} columns of the kind {how} among {kinds}")
    return names[0]


def _mean_and_std(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, 0 to 1, of each channel of uint8 (N, pixels, C)."""
    channels = [images[..., channel].ravel() for channel in range(images.shape[2])]
    shares = np.array([np.bincount(c, minlength=256) for c in channels]) / channels[0].size
    levels = np.arange(256) / 255
    mean = shares @ levels
    variance = [share @ (levels - m) ** 2 for share, m in zip(shares, mean, strict=True)]
    rounded = [[float(f"{x:.4g}") for x in values] for values in (mean, np.sqrt(variance))]
    return rounded[0], rounded[1]


def _partition(
    dataset: Dataset, num_partitions: int, alpha: float, seed: int, target: Path
) -> None:
    """Let Flower Datasets partition the labels, and write the positions that each node gets."""
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = np.load(dataset.folder / "train_labels.npy")
    rows = datasets.Dataset.from_dict({"label": labels, "position": np.arange(len(labels))})
    try:
        partitioner = DirichletPartitioner(
            num_partitions, "label", alpha, MIN_PARTITION_SIZE, self_balancing=False, seed=seed
        )
        partitioner.dataset = rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at each new attempt; the last one raises
            parts = [partitioner.load_partition(i)["position"] for i in range(num_partitions)]
    except (ValueError, MemoryError) as error:
        raise DataError(
            f"dataset: expected the {len(labels)} training examples to fill {num_partitions} "
            f"partitions with {MIN_PARTITION_SIZE} or more each at dirichlet-alpha {alpha:g}, "
            f"which did not come about; use fewer nodes or a larger dirichlet-alpha"
        ) from error
    np.save(target / "indices.npy", np.concatenate([np.asarray(part, np.int64) for part in parts]))
    np.save(target / "offsets.npy", np.cumsum([0, *(len(part) for part in parts)]))
