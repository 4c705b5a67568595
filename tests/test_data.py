"""Decoding, caching, partitioning and splitting, against Flower Datasets itself."""

import hashlib
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlib import prepare
from fedlib.data import (
    Dataset,
    federated_dataset,
    load_partition,
    load_test,
    open_dataset,
    partition_indices,
    split_indices,
)
from fedlib.errors import DataError
from fedlib.prepare import HUB_NAME, find_source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this test only."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(folder))
    return folder


def python(code: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_line(process: "subprocess.Popen[str]") -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def write_folder(folder: Path, **changes: Any) -> Path:
    """Write 30 training and 10 test images of the right layout, but for the changes."""
    import datasets

    side, mode = changes.get("side", 28), changes.get("mode", "L")
    names = [str(i) for i in range(changes.get("num_classes", 10))]
    folder.mkdir()
    for split, size in changes.get("splits", {"train": 30, "test": 10}).items():
        rng = np.random.default_rng(size)
        shape = (size, side, side) if mode == "L" else (size, side, side, 3)
        columns = {
            "image": list(rng.integers(0, 256, shape, dtype=np.uint8)),
            "label": [i % len(names) for i in range(size)],
        }
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        if changes.get("plain_labels"):
            features["label"] = datasets.Value("int64")
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        for old, new in changes.get("rename", {}).items():
            table = table.rename_column(old, new)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def images_of(rows: Any) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(image) for image in rows["image"]]))


def reference(folder: Path, num_partitions: int, alpha: float, seed: int) -> Any:
    """Build the same with Flower Datasets alone."""
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=num_partitions, partition_by="label", alpha=alpha, seed=seed
    )
    return FederatedDataset(dataset=str(folder), partitioners={"train": partitioner})


@pytest.mark.parametrize(("num_partitions", "alpha", "seed"), [(5, 1.0, 42), (3, 0.5, 7)])
def test_partitions_are_exactly_those_of_flower_datasets(
    small_folder: Path, small_dataset: Dataset, num_partitions: int, alpha: float, seed: int
) -> None:
    ours = federated_dataset(str(small_folder), num_partitions, alpha, seed)
    theirs = reference(small_folder, num_partitions, alpha, seed)
    for partition_id in range(num_partitions):
        part = load_partition(small_dataset, num_partitions, alpha, seed, partition_id)
        images = torch.cat([part.train.images, part.validation.images])
        labels = torch.cat([part.train.labels, part.validation.labels])
        for federated in (ours, theirs):
            rows = federated.load_partition(partition_id)
            assert torch.equal(images, images_of(rows))
            assert labels.tolist() == rows["label"]


def test_test_split_is_that_of_flower_datasets(small_folder: Path, small_dataset: Dataset) -> None:
    rows = reference(small_folder, 2, 1.0, 42).load_split("test")
    test = load_test(small_dataset)
    assert len(test) == 200
    assert torch.equal(test.images, images_of(rows))
    assert test.labels.tolist() == rows["label"]


def test_every_training_example_is_in_exactly_one_partition(small_dataset: Dataset) -> None:
    indices = partition_indices(small_dataset, 10, 1.0, 42)
    assert len(indices) == 10
    assert sorted(np.concatenate(indices).tolist()) == list(range(1_200))
    assert min(map(len, indices)) >= 10


def test_dtypes_shapes_and_constants_of_a_partition(small_dataset: Dataset) -> None:
    part = load_partition(small_dataset, 10, 1.0, 42, 0)
    for split in (part.train, part.validation):
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split), 28, 28)
        assert split.labels.dtype == torch.int64
        assert (split.mean, split.std) == (small_dataset.mean, small_dataset.std)


def test_a_fifth_of_each_partition_is_for_validation(small_dataset: Dataset) -> None:
    for partition_id, indices in enumerate(partition_indices(small_dataset, 10, 1.0, 42)):
        part = load_partition(small_dataset, 10, 1.0, 42, partition_id)
        assert len(part.validation) == round(len(indices) / 5)
        assert len(part.train) + len(part.validation) == len(indices)


@pytest.mark.parametrize(
    ("size", "num_validation"),
    [(2, 1), (3, 1), (7, 1), (8, 2), (10, 2), (12, 2), (13, 3), (99, 20)],
)
def test_split_by_hand(size: int, num_validation: int) -> None:
    train, validation = split_indices(np.arange(100, 100 + size), 0)
    assert train.tolist() == list(range(100, 100 + size - num_validation))
    assert validation.tolist() == list(range(100 + size - num_validation, 100 + size))


@pytest.mark.parametrize("size", [0, 1])
def test_partition_too_small_to_split_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"partition 7: expected at least 2 .* got {size}"):
        split_indices(np.arange(size), 7)


def test_mean_and_std_are_numpys_over_the_training_pixels(
    small_folder: Path, small_dataset: Dataset
) -> None:
    rows = reference(small_folder, 2, 1.0, 42).load_split("train")
    pixels = images_of(rows).numpy().astype(np.float64) / 255
    assert small_dataset.mean == pytest.approx(pixels.mean(), abs=5.1e-5)
    assert small_dataset.std == pytest.approx(pixels.std(), abs=5.1e-5)


def test_normalised_training_images_have_mean_zero_and_deviation_one(
    small_dataset: Dataset,
) -> None:
    images = torch.from_numpy(np.load(small_dataset.folder / "train_images.npy"))
    normalised = load_test(small_dataset).normalize(images)
    assert normalised.dtype == torch.float32
    assert normalised.shape == (1_200, 1, 28, 28)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-3)
    assert normalised.std().item() == pytest.approx(1, abs=1e-3)


def sizes(dataset: Dataset, num_partitions: int, alpha: float, seed: int) -> list[list[int]]:
    return [part.tolist() for part in partition_indices(dataset, num_partitions, alpha, seed)]


def test_another_setting_gives_other_partitions(small_dataset: Dataset) -> None:
    first = sizes(small_dataset, 5, 1.0, 42)
    assert len(sizes(small_dataset, 4, 1.0, 42)) == 4
    assert sizes(small_dataset, 5, 2.0, 42) != first
    assert sizes(small_dataset, 5, 1.0, 43) != first
    assert sizes(small_dataset, 5, 1.0, 42) == first


def test_settings_that_differ_in_the_last_digits_are_not_mixed_up(
    small_folder: Path, small_dataset: Dataset
) -> None:
    # NumPy draws in another way below 0.1: partitions of these two have little in common.
    for alpha in (0.1, 0.09999999):
        rows = reference(small_folder, 3, alpha, 42)
        expected = [list(rows.load_partition(i)["label"]) for i in range(3)]
        labels = np.load(small_dataset.folder / "train_labels.npy")
        indices = partition_indices(small_dataset, 3, alpha, 42)
        assert [labels[part].tolist() for part in indices] == expected, f"alpha {alpha}"


def refuse(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as refusal:
        call()
    text = str(refusal.value)
    assert "\n" not in text
    assert "expected" in text
    return text


@pytest.mark.parametrize("partition_id", [-1, 5, 1_000])
def test_partition_out_of_range_is_refused(small_dataset: Dataset, partition_id: int) -> None:
    text = refuse(lambda: load_partition(small_dataset, 5, 1.0, 42, partition_id))
    assert f"partition {partition_id}: expected 0 to 4" in text


@pytest.mark.parametrize("num_partitions", [200, 5_000])
def test_more_partitions_than_the_data_can_fill_are_refused(
    small_dataset: Dataset, num_partitions: int
) -> None:
    text = refuse(lambda: load_partition(small_dataset, num_partitions, 1.0, 42, 0))
    assert "1200 training examples" in text
    assert f"{num_partitions} partitions" in text
    leftovers = [p.name for p in small_dataset.folder.iterdir() if p.suffix == ".partial"]
    assert leftovers == []


@pytest.mark.parametrize(
    "name",
    [
        "auto",
        "garments",
        "fashion_mnist",
        "/no/such/folder",
        "~no-such-user/images",
        "../x",
        "x" * 300,
    ],
)
def test_unknown_dataset_is_refused_with_what_may_be_written(name: str) -> None:
    for call in (open_dataset, find_source):
        text = refuse(lambda call=call: call(name))  # type: ignore[misc]
        for known in ("fashion-mnist", "owner/name", "folder with parquet files"):
            assert known in text


def test_folder_without_parquet_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("image,label\n")
    assert "without .parquet" in refuse(lambda: open_dataset(str(tmp_path)))


def complete_or_lock(cache: Path) -> list[str]:
    """What lies in the cache beside finished folders and locks."""
    finished = {info.parent for info in cache.rglob("info.json")}
    return [
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.suffix != ".lock" and path not in finished and path.parent not in finished
    ]


FAULTS: dict[str, dict[str, Any]] = {
    "no image column": {"rename": {"image": "picture"}},
    "no label column": {"rename": {"label": "class"}},
    "no test split": {"splits": {"train": 30}},
    "no training split": {"splits": {"test": 30}},
    "large images": {"side": 32},
    "colour images": {"mode": "RGB"},
    "labels without names": {"plain_labels": True},
    "eleven classes": {"num_classes": 11},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_of_another_layout_is_refused_and_leaves_nothing(
    fault: str, tmp_path: Path, cache: Path
) -> None:
    folder = write_folder(tmp_path / "images", **FAULTS[fault])
    for _ in range(2):  # the second time too
        text = refuse(lambda: open_dataset(str(folder)))
        assert str(folder) in text
        assert "FEDLIB_CACHE_DIR" not in text  # the cache is not to blame
    assert complete_or_lock(cache) == []


def test_corrupt_parquet_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "images")
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    text = refuse(lambda: open_dataset(str(folder)))
    assert str(folder) in text
    assert "FEDLIB_CACHE_DIR" not in text
    assert complete_or_lock(cache) == []


def test_corrupt_image_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    import pyarrow.parquet as pq

    folder = write_folder(tmp_path / "images")
    file = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = b"no picture"
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    text = refuse(lambda: open_dataset(str(folder)))
    assert str(folder) in text
    assert "FEDLIB_CACHE_DIR" not in text  # there is nothing wrong with the cache
    assert complete_or_lock(cache) == []


def test_mended_folder_is_read_anew(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "images", splits={"train": 30, "test": 10})
    assert len(load_test(open_dataset(str(folder)))) == 10
    shutil.rmtree(folder)
    write_folder(folder, splits={"train": 30, "test": 12})
    assert len(load_test(open_dataset(str(folder)))) == 12
    assert complete_or_lock(cache) == []


def test_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(tmp_path / "file" / "cache"))
    text = refuse(lambda: open_dataset(str(folder)))
    assert str(tmp_path / "file" / "cache") in text
    assert "FEDLIB_CACHE_DIR" in text


def test_build_once_builds_once_for_many_threads(tmp_path: Path) -> None:
    builds, start = [], threading.Barrier(8)

    def build(target: Path) -> None:
        builds.append(list(target.iterdir()))
        (target / "done").write_text("whole")

    def ask() -> None:
        start.wait()
        prepare.build_once(tmp_path / "folder", build)
        assert (tmp_path / "folder" / "done").read_text() == "whole"

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [[]]  # once, into an empty folder


def digest(dataset: Dataset) -> str:
    """Hash all images and labels, part by part."""
    parts = [load_partition(dataset, 3, 1.0, 42, i) for i in range(3)]
    splits = [load_test(dataset), *(p.train for p in parts), *(p.validation for p in parts)]
    tensors = [tensor for split in splits for tensor in (split.images, split.labels)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


OPEN = f"""
import hashlib, json, sys
from fedlib.data import Dataset, load_partition, load_test, open_dataset
{inspect.getsource(digest)}
result = digest(open_dataset(sys.argv[1]))
heavy = {{"datasets", "flwr_datasets", "PIL", "pyarrow", "pandas", "torchvision"}}
print(json.dumps([result, sorted(heavy & set(sys.modules))]))
"""


def test_two_processes_fill_the_same_cache_and_a_third_only_reads_it(
    small_folder: Path, small_dataset: Dataset, cache: Path
) -> None:
    both = [python(OPEN, str(small_folder)) for _ in range(2)]
    first, second = (last_line(process) for process in both)
    assert first[0] == second[0] == digest(small_dataset)
    assert not list(cache.rglob("*.partial"))
    third = last_line(python(OPEN, str(small_folder)))
    assert third == [first[0], []]  # the images are not decoded again: no library for it


def test_importing_the_client_app_imports_nothing_heavy() -> None:
    code = (
        "import json, sys; import fedlib.client_app;"
        "heavy = {'wandb', 'matplotlib', 'datasets', 'flwr_datasets', 'torchvision', 'PIL'};"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    assert last_line(python(code)) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from fedlib.prepare import build_once
def build(target):
    (target / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
build_once(Path(sys.argv[1]), build)
"""


def test_process_killed_half_way_leaves_a_cache_that_can_be_filled(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    process = python(KILLED, str(folder))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert [path.name for path in folder.parent.rglob("half")] == ["half"]
    prepare.build_once(folder, lambda target: (target / "whole").write_text("whole"))  # type: ignore[arg-type,return-value]
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(folder.parent.rglob("half"))


def test_leftover_of_a_killed_decode_is_not_taken_for_data(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "images")
    target = find_source(str(folder)).cache_folder
    leftover = target.with_name(target.name + ".partial")
    leftover.mkdir(parents=True)
    np.save(leftover / "test_images.npy", np.zeros((3, 28, 28), np.uint8))
    dataset = open_dataset(str(folder))
    assert len(load_test(dataset)) == 10
    assert complete_or_lock(cache) == []


# --- Where Fashion-MNIST comes from


@pytest.mark.usefixtures("cache")
def test_fashion_mnist_is_the_included_copy_then_the_cache_and_the_hub_is_never_asked() -> None:
    """Whoever looks up a name on the network ends this process."""
    code = (
        "import json, os, socket; socket.getaddrinfo = lambda *_, **__: os._exit(7);"
        "from fedlib.data import open_dataset; from fedlib.prepare import find_source;"
        "first = str(find_source('fashion-mnist')); mean = open_dataset().mean;"
        "print(json.dumps([first, mean, str(find_source('fashion-mnist'))]))"
    )
    first, mean, second = last_line(python(code, HF_HUB_OFFLINE="0"))
    assert first == f"fashion-mnist, from {Path(prepare.__file__).parent / 'fashion_mnist'}"
    assert mean == 0.286
    assert second == "fashion-mnist, from the cache"


def test_the_apps_code_alone_finds_the_copy_of_the_installed_package(tmp_path: Path) -> None:
    """As on a node: ``flwr run`` sends the code, in a folder of its own, without the images."""
    package = Path(prepare.__file__).parent
    shutil.copytree(package, tmp_path / "fedlib", ignore=shutil.ignore_patterns("*.parquet"))
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from fedlib import prepare;"
        "print(json.dumps([prepare.__file__, prepare.find_source('fashion-mnist').path]))"
    )
    file, path = last_line(python(code, str(tmp_path)))
    assert file == str(tmp_path / "fedlib" / "prepare.py")
    assert path == str(package / "fashion_mnist")


def test_another_name_on_the_hub_has_a_cache_of_its_own(cache: Path) -> None:
    source = find_source("ylecun/mnist")
    assert (source.name, source.path) == ("ylecun/mnist", "ylecun/mnist")
    assert str(source) == "ylecun/mnist, from the Hugging Face Hub"
    assert source.cache_folder == cache / "hub" / "ylecun" / "mnist"


ONLY_THE_HUB = """
import json
from fedlib import prepare
from fedlib.data import open_dataset
from fedlib.errors import DataError
prepare._included_copy = lambda: None  # as in an environment that has the app's code only
try:
    open_dataset("fashion-mnist")
except DataError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(params=["refuses", "never answers", "offline mode"])
def no_hub(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment variables of a process that reaches no Hub."""
    if request.param == "offline mode":
        yield {"HF_HUB_OFFLINE": "1"}
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            server.listen()  # the kernel accepts; nobody reads
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "NO_PROXY": "*", "no_proxy": "*"}


def test_without_the_hub_it_ends_with_one_line(no_hub: dict[str, str], tmp_path: Path) -> None:
    places = {"HF_HOME": str(tmp_path / "hub"), "FEDLIB_CACHE_DIR": str(tmp_path / "cache")}
    text = last_line(python(ONLY_THE_HUB, **no_hub, **places))
    assert "\n" not in text
    assert HUB_NAME in text
    assert "pip install ./fedlib" in text and "the absolute path of a folder" in text
    assert complete_or_lock(tmp_path / "cache") == []
