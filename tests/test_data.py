"""Decoding, caching, partitioning and splitting, against Flower Datasets itself."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner
from PIL import Image

import fedlib
import make_fashion_mnist
from fedlib import Config, Dataset, data, find_source, load_partition, load_test, open_dataset, run

NAMES = ["cat", "deer", "dog", "frog", "horse"]
PICTURE, LABEL, NUMBER = datasets.Image(), datasets.ClassLabel(names=NAMES), datasets.Value("int64")
SIZES = {"train": 30, "test": 10}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this test only."""
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / data.CACHE_VERSION


def write_folder(
    folder: Path,
    columns: dict[str, Any] | None = None,
    sizes: dict[str, int] = SIZES,
    shapes: dict[str, list[tuple[int, ...]]] | None = None,
    labels: dict[str, list[int | None]] | None = None,
) -> Path:
    """Write parquet files of random images with labels from 0 to 4, but for the changes."""
    columns = columns or {"image": PICTURE, "label": LABEL}
    folder.mkdir()
    for split, size in sizes.items():
        rng = np.random.default_rng(size)
        cycle = (shapes or {}).get(split, [(28, 28)])
        images = [rng.integers(0, 256, cycle[i % len(cycle)], dtype=np.uint8) for i in range(size)]
        numbers = (labels or {}).get(split) or rng.integers(0, 5, size).tolist()
        values = {name: images if kind is PICTURE else numbers for name, kind in columns.items()}
        table = datasets.Dataset.from_dict(values, features=datasets.Features(columns))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of CIFAR-10: 300 training and 60 test images of five classes."""
    return write_folder(
        tmp_path_factory.mktemp("parent") / "cifar",
        {"img": PICTURE, "label": LABEL},
        {"train": 300, "test": 60},
        {"train": [(32, 32, 3)], "test": [(32, 32, 3)]},
    )


@pytest.fixture(params=["small_folder", "cifar_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A folder of grey images, then one of colour images."""
    path: Path = request.getfixturevalue(request.param)
    return path


def images_of(rows: Any) -> torch.Tensor:
    column = "img" if "img" in rows.features else "image"
    return torch.tensor(np.stack([np.asarray(image) for image in rows[column]]))


def reference(folder: Path, num_partitions: int = 2, alpha: float = 1.0, seed: int = 42) -> Any:
    """Build the same with Flower Datasets alone."""
    partitioner = DirichletPartitioner(
        num_partitions=num_partitions, partition_by="label", alpha=alpha, seed=seed
    )
    return FederatedDataset(dataset=str(folder), partitioners={"train": partitioner})


@pytest.mark.parametrize(
    ("num_partitions", "alpha", "seed"),
    # NumPy draws in another way below 0.1: partitions of the last two have little in common.
    [(5, 1.0, 42), (4, 1.0, 42), (5, 2.0, 42), (5, 1.0, 7), (3, 0.1, 42), (3, 0.09999999, 42)],
)
def test_partitions_are_exactly_those_of_flower_datasets(
    folder: Path, num_partitions: int, alpha: float, seed: int
) -> None:
    dataset, theirs = open_dataset(str(folder)), reference(folder, num_partitions, alpha, seed)
    indices = fedlib.partition_indices(dataset, num_partitions, alpha, seed)
    everything = range(sum(map(len, indices)))
    assert sorted(np.concatenate(indices).tolist()) == list(everything)
    for partition_id in range(num_partitions):
        part = load_partition(dataset, num_partitions, alpha, seed, partition_id)
        rows = theirs.load_partition(partition_id)
        assert torch.equal(torch.cat([part.train.images, part.validation.images]), images_of(rows))
        assert torch.cat([part.train.labels, part.validation.labels]).tolist() == rows["label"]
        assert len(part.validation) == round(len(rows) / 5)  # a fifth


def test_the_test_split_is_that_of_flower_datasets(folder: Path) -> None:
    rows, test = reference(folder).load_split("test"), load_test(open_dataset(str(folder)))
    assert (test.images.dtype, test.labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(test.images, images_of(rows))
    assert test.labels.tolist() == rows["label"]


def test_shape_names_means_and_deviations_come_from_the_training_set(folder: Path) -> None:
    dataset, rows = open_dataset(str(folder)), reference(folder).load_split("train")
    assert dataset.class_names == tuple(rows.features["label"].names)
    pixels = images_of(rows).numpy() / 255
    pixels = pixels.reshape(*pixels.shape[:3], -1)  # (N, H, W, C)
    assert dataset.shape == (pixels.shape[3], *pixels.shape[1:3])
    assert dataset.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=5.1e-5)
    assert dataset.std == pytest.approx(pixels.std((0, 1, 2)), abs=5.1e-5)
    train = load_partition(dataset, 2, 1.0, 42, 0).train
    assert (train.mean, train.std) == (dataset.mean, dataset.std)
    normal = train.normalize(images_of(rows))
    assert (normal.dtype, normal.shape) == (torch.float32, (len(rows), *dataset.shape))
    assert normal.mean((0, 2, 3)).tolist() == pytest.approx([0] * dataset.shape[0], abs=1e-3)
    assert normal.std((0, 2, 3)).tolist() == pytest.approx([1] * dataset.shape[0], abs=1e-3)


def test_normalised_colours_by_hand() -> None:
    split = fedlib.Split(torch.zeros(0), torch.zeros(0), mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    image = torch.tensor([[[[51, 102, 255], [255, 0, 153]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    # 51/255, 102/255 and 153/255 are 0.2, 0.4 and 0.6
    expected = torch.tensor([[[[0.0, 1.6]], [[0.0, -1.6]], [[4.0, 0.0]]]])  # (1, 3, 1, 2)
    assert torch.allclose(split.normalize(image), expected, atol=1e-6)


def test_a_folder_in_cifars_layout_trains(cifar_folder: Path, small_config: Config) -> None:
    hashes = set()
    for augmentation in (True, False):
        changes = {"dataset": str(cifar_folder), "augmentation": augmentation}
        config = Config(**{**vars(small_config), **changes, "num_server_rounds": 1})
        state = run(fedlib.LocalGrid(fedlib.make_client_app(config), 3), config)
        assert state["conv1.weight"].shape == (16, 3, 5, 5)
        assert state["fc2.weight"].shape == (5, 128)
        hashes.add(fedlib.state_hash(state))
    assert len(hashes) == 2
    for path in Path(config.output_dir).glob("*/*"):
        [record] = fedlib.load_results(path)["rounds"]
        assert record["train"]["num_received"] == record["train"]["num_sent"] == 2
        assert 0 <= record["centralized_accuracy"] <= 1


def refuse(call: Callable[[], object]) -> str:
    with pytest.raises(fedlib.DataError) as refusal:
        call()
    text = str(refusal.value)
    assert "\n" not in text and "expected" in text
    return text


@pytest.mark.parametrize("partition_id", [-1, 5])
def test_a_partition_out_of_range_is_refused(small_dataset: Dataset, partition_id: int) -> None:
    text = refuse(lambda: load_partition(small_dataset, 5, 1.0, 42, partition_id))
    assert f"partition {partition_id}: expected 0 to 4" in text


@pytest.mark.parametrize("num_partitions", [200, 10**12])
def test_more_partitions_than_the_data_can_fill_are_refused(
    small_dataset: Dataset, num_partitions: int
) -> None:
    text = refuse(lambda: load_partition(small_dataset, num_partitions, 1.0, 42, 0))
    assert "1200 training examples" in text and f"{num_partitions} partitions" in text
    assert not list(small_dataset.folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["fashion_mnist", "/no/such", "x" * 300])
def test_an_unknown_data_set_is_refused_with_what_may_be_written(name: str) -> None:
    for call in (open_dataset, find_source):
        text = refuse(lambda call=call: call(name))  # type: ignore[misc]
        for known in ("fashion-mnist", "owner/name", "folder with parquet files", repr(name)):
            assert known in text


def change_file(folder: Path, split: str, change: Callable[[list[Any]], object]) -> None:
    """Change a parquet file's rows, without the checks of the datasets library."""
    file = folder / f"{split}-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


FAULTS: dict[str, dict[str, Any]] = {
    "no image column": {"columns": {"label": LABEL}},
    "two label columns": {"columns": {"img": PICTURE, "coarse": LABEL, "fine": LABEL}},
    "no test split": {"sizes": {"train": 30}},
    "images of two sizes": {"shapes": {"train": [(28, 28), (28, 32)]}},
    "test images of another size": {"shapes": {"test": [(32, 32)]}},
    "unlabelled rows": {"labels": {"test": [-1] * 10}},
    "whole numbers as labels": {"columns": {"image": PICTURE, "label": NUMBER}},
}
BLACK = make_fashion_mnist.png(np.zeros((28, 28), np.uint8))
CHANGES: dict[str, tuple[str, Callable[[list[Any]], object]]] = {
    "black images": ("train", lambda rows: [row["image"].update(bytes=BLACK) for row in rows]),
    "no picture": ("train", lambda rows: rows[3]["image"].update(bytes=b"no picture")),
    "a missing picture": ("train", lambda rows: rows[3].update(image=None)),
}


@pytest.mark.parametrize("fault", [*FAULTS, *CHANGES, "half a file"])
def test_a_folder_that_cannot_be_used_is_one_line_and_leaves_nothing(
    fault: str, tmp_path: Path, cache: Path
) -> None:
    folder = write_folder(tmp_path / "images", **FAULTS.get(fault, {}))
    if fault in CHANGES:
        change_file(folder, *CHANGES[fault])
    if fault == "half a file":
        file = folder / "train-00000-of-00001.parquet"
        file.write_bytes(file.read_bytes()[:-100])
    for _ in range(2):  # the second time too
        text = refuse(lambda: open_dataset(str(folder)))
        assert str(folder) in text
        assert "FEDLIB_CACHE_DIR" not in text  # the cache is not to blame
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_file_without_the_librarys_kinds_of_columns_is_told_how_it_gets_them(
    tmp_path: Path, cache: Path
) -> None:
    folder = write_folder(tmp_path / "numbers", **FAULTS["whole numbers as labels"])
    text = refuse(lambda: open_dataset(str(folder)))
    made_of = "integers from 0 after cast_column(name, ClassLabel(names=[...]))"
    assert f"0 columns of the kind ClassLabel ({made_of}) among {{'image': 'Image', " in text
    for file in folder.iterdir():  # as pandas writes it, without what datasets adds
        pq.read_table(file).to_pandas().to_parquet(file)
    text = refuse(lambda: open_dataset(str(folder)))
    assert "0 columns of the kind Image (files' bytes after cast_column(name, Image()))" in text


def encode(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "TIFF")  # which knows all these modes
    return file.getvalue()


def write_pictures(folder: Path, picture: Image.Image) -> Path:
    """Write a folder in which every image is this one."""
    write_folder(folder)
    for split in SIZES:
        change_file(
            folder, split, lambda rows: [r["image"].update(bytes=encode(picture)) for r in rows]
        )
    return folder


def test_bilevel_and_palette_images_become_grey_and_coloured(tmp_path: Path, cache: Path) -> None:
    bilevel = Image.new("1", (2, 2))
    bilevel.putpixel((1, 0), 1)
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30, 250, 100, 0])
    palette.putpixel((1, 0), 1)
    dark, light = [10, 20, 30], [250, 100, 0]
    for picture, expected in (
        (bilevel, [[0, 255], [0, 0]]),
        (palette, [[dark, light], [dark, dark]]),
    ):
        dataset = open_dataset(str(write_pictures(tmp_path / f"of {picture.mode}", picture)))
        assert load_test(dataset).images.tolist() == [expected] * SIZES["test"]
    assert dataset.shape == (3, 2, 2)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LA", "RGBA", "CMYK"])
def test_images_that_bytes_cannot_hold_are_refused_by_their_modes_name(
    mode: str, tmp_path: Path, cache: Path
) -> None:
    folder = write_pictures(tmp_path / "images", Image.new(mode, (2, 2)))
    text = refuse(lambda: open_dataset(str(folder)))
    assert f"images of mode {mode}, not of L, RGB, 1, P" in text


def test_a_single_pixel_that_is_not_black_has_a_mean_and_a_deviation(
    tmp_path: Path, cache: Path
) -> None:
    folder = write_pictures(tmp_path / "images", Image.new("L", (28, 28)))
    one = np.zeros((28, 28), np.uint8)
    one[3, 4] = 51  # a fifth of white
    picture = encode(Image.fromarray(one))
    change_file(folder, "train", lambda rows: rows[7]["image"].update(bytes=picture))
    dataset, share = open_dataset(str(folder)), 1 / (30 * 28 * 28)
    assert dataset.mean == pytest.approx((0.2 * share,), rel=5e-4)  # four digits
    assert dataset.std == pytest.approx((0.2 * (share * (1 - share)) ** 0.5,), rel=5e-4)


def test_a_mended_folder_is_read_anew_and_a_killed_decode_is_not_taken_for_data(
    tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "images"
    for size in (10, 12):
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, sizes={"train": 30, "test": size})
        target = find_source(str(folder)).cache_folder
        leftover = target.with_name(target.name + ".partial")
        leftover.mkdir(parents=True)
        np.save(leftover / "test_images.npy", np.zeros((3, 28, 28), np.uint8))
        assert len(load_test(open_dataset(str(folder)))) == size
        assert not list(cache.glob("*.partial"))
    os.utime(folder / "test-00000-of-00001.parquet", (1, 1))  # of the same size, but another
    assert find_source(str(folder)).cache_folder != target


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images")
    in_the_way = folder / "test-00000-of-00001.parquet"
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(in_the_way))
    text = refuse(lambda: open_dataset(str(folder)))
    assert f"data cache {in_the_way}" in text and "set FEDLIB_CACHE_DIR" in text


INFO = {"class_names": NAMES, "shape": [1, 28, 28], "mean": [0.5], "std": [0.25]}
DAMAGED = [
    *("", "{", "[]", json.dumps({k: v for k, v in INFO.items() if k != "std"})),
    *(json.dumps(INFO | {"mean": mean}) for mean in ([float("nan")], ["0.5"], [], None, [1.5])),
    *(json.dumps(INFO | {"std": std}) for std in ([0.0], [float("inf")], [0.2, 0.2], 0.25)),
    *(json.dumps(INFO | {"shape": shape}) for shape in ([1, 28], [1.0, 28, 28], [1, 0, 28], "1ab")),
    *(json.dumps(INFO | {"class_names": names}) for names in ([], "abcde", [1, 2], None)),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_information_in_the_cache_is_one_line_that_says_what_to_delete(
    text: str, tmp_path: Path, cache: Path
) -> None:
    source = find_source(str(write_folder(tmp_path / "images")))
    file = source.cache_folder / "info.json"
    open_dataset(source.path)
    file.write_text(json.dumps(INFO), encoding="utf-8")
    data._open.cache_clear()  # as a new process
    assert open_dataset(source.path).mean == (0.5,)
    data._open.cache_clear()
    file.write_text(text, encoding="utf-8")
    refusal = refuse(lambda: open_dataset(source.path))
    assert f"data cache {file}: " in refusal and f"delete the folder {file.parent}," in refusal
    shutil.rmtree(file.parent)
    assert open_dataset(source.path).shape == (1, 28, 28)


@pytest.mark.parametrize("name", ["train_images", "train_labels", "test_images", "test_labels"])
@pytest.mark.parametrize("keep", [slice(0), slice(-1), None])
def test_damaged_arrays_in_the_cache_are_found_when_the_data_set_is_opened(
    name: str, keep: slice | None, tmp_path: Path, cache: Path
) -> None:
    source = find_source(str(write_folder(tmp_path / "images")))
    file = source.cache_folder / f"{name}.npy"
    dataset = open_dataset(source.path)
    partitions = dataset.folder / "partitions-2-alpha-1000000.0-seed-1"
    fedlib.partition_indices(dataset, 2, 1e6, 1)
    for damaged in (file, partitions / "indices.npy"):
        content = damaged.read_bytes()
        damaged.unlink()
        if keep is not None:
            damaged.write_bytes(content[keep])
    data._open.cache_clear()
    fedlib.partition_indices.cache_clear()
    text = refuse(lambda: open_dataset(source.path))
    assert f"data cache {file}: " in text and f"delete the folder {file.parent}," in text
    text = refuse(lambda: fedlib.partition_indices(dataset, 2, 1e6, 1))
    assert "indices.npy: " in text and f"delete the folder {partitions}," in text


def test_a_folder_behind_a_link_keeps_the_name_it_was_given(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node, the link may lead elsewhere."""
    folder = write_folder(tmp_path / "images")
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert str(find_source(str(link))) == open_dataset(str(link)).name == str(link)
    assert find_source(str(link)).cache_folder == find_source(str(folder)).cache_folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_source("link").name == find_source("~/link").name == str(link)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone may change")
def test_a_user_without_a_home_directory_is_told_what_to_set(tmp_path: Path) -> None:
    script = (
        "import os, sys, fedlib\n"
        "os.setuid(54321)  # of whom there is no entry\n"
        "if len(sys.argv) > 1: os.environ['HOME'] = sys.argv[1]\n"
        "try: print(fedlib.find_source('fashion-mnist')), fedlib.open_dataset()\n"
        "except fedlib.DataError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"HOME", "FEDLIB_CACHE_DIR"}}
    (tmp_path / "another's").mkdir(mode=0o700)
    for home, expected in (([], "got none for this user"), (["another's"], "Permission denied")):
        command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in home)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        line = done.stdout.splitlines()[-1]
        assert line.startswith("data cache ") and expected in line and "FEDLIB_CACHE_DIR" in line


def test_many_at_the_same_time_build_once(tmp_path: Path) -> None:
    """Threads here; processes meet at the same lock."""
    builds, start = [], threading.Barrier(8)

    def build(target: Path) -> None:
        builds.append(list(target.iterdir()))
        time.sleep(0.1)  # until all others wait
        (target / "done").touch()

    def ask() -> None:
        start.wait()
        data._build_once(tmp_path / "folder", build)
        assert (tmp_path / "folder" / "done").exists()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [[]]  # once, into an empty folder


# --- Where Fashion-MNIST comes from


@pytest.fixture(params=["refuses", "never answers", "offline mode"])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Hub answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            server.listen()  # the kernel accepts; nobody reads
        if request.param != "offline mode":
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(data, "HUB_TIMEOUT_S", 0.5)
            for name in ("no_proxy", "NO_PROXY"):
                monkeypatch.setenv(name, "*")
        huggingface_hub.close_session()  # it remembers proxies
        yield
    huggingface_hub.close_session()


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_it_ends_with_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_included_copy", lambda: None)  # as where only the app's code is
    text = refuse(open_dataset)
    for words in (
        "from the Hugging Face Hub",
        "pip install ./fedlib",
        "the absolute path of a folder",
    ):
        assert words in text
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_fashion_mnist_is_the_included_copy_then_the_cache_and_the_hub_is_never_asked(
    small_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *name, **_: asked.append(name))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data, "_included_copy", lambda: str(small_folder))
    assert str(find_source("fashion-mnist")) == f"fashion-mnist, from {small_folder}"
    assert len(load_test(open_dataset())) == 200
    assert str(find_source("fashion-mnist")) == "fashion-mnist, from the cache"
    assert asked == []


def test_the_apps_code_alone_finds_the_copy_of_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node: ``flwr run`` sends the code, in a folder of its own, without the images."""
    (tmp_path / "fedlib" / "fashion_mnist").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = data._included_copy.__wrapped__()
    assert folder == str(Path(data.__file__).parent / "fashion_mnist")
