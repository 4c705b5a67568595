import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Image, load_dataset
from numpy.typing import NDArray
from PIL import Image as PILImage

from fedlib import garments
from fedlib.model import CNN

FILES = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
# Measured after two epochs on 12,000 garments, over five seeds: 0.89-0.90 on garments, 0.72-0.76 on
# the 450 real images. A drawing that loses its transfer drops far below these floors.
LEAST_ACCURACY_ON_GARMENTS = 0.82
LEAST_ACCURACY_ON_REAL_IMAGES = 0.62


def normalise(images: NDArray[np.uint8]) -> torch.Tensor:
    return (torch.from_numpy(images).float().div(255).sub(0.2860).div(0.3530)).unsqueeze(1)


def accuracy(model: CNN, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    with torch.no_grad():
        return float((model(normalise(images)).argmax(1).numpy() == labels).mean())


@pytest.fixture(scope="module")
def trained_model() -> Iterator[CNN]:
    """The course's model after two epochs of plain SGD on 12,000 garments."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several threads wait for one another
    images, labels = garments.draw_split("train", 12_000)
    x, y = normalise(images), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(0)
    model = CNN(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for learning_rate in (0.05, 0.01):
        optimizer.param_groups[0]["lr"] = learning_rate
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    yield model.eval()
    torch.set_num_threads(num_threads)


def test_class_names_are_those_of_the_real_dataset(real_images: Path) -> None:
    assert load_dataset(str(real_images), split="test").features["label"].names == list(
        garments.CLASS_NAMES
    )


@pytest.mark.parametrize("label", range(10))
def test_a_class_is_drawn_as_grey_images_with_something_on_them(label: int) -> None:
    images = garments.draw_class(label, 40, np.random.default_rng(label))

    assert images.shape == (40, 28, 28)
    assert images.dtype == np.uint8
    assert ((images > 12).mean(axis=(1, 2)) > 0.05).all()  # no image is (nearly) empty
    assert len(np.unique(images, axis=0)) == 40


def test_a_split_has_the_documented_shapes_and_types() -> None:
    images, labels = garments.draw_split("test", 30)

    assert images.shape == (30, 28, 28)
    assert images.dtype == np.uint8
    assert labels.shape == (30,)
    assert labels.dtype == np.int64


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    images, labels = garments.draw_split("train", 3_000, seed=7)
    again, labels_again = garments.draw_split("train", 3_000, seed=7)
    others, _ = garments.draw_split("train", 3_000, seed=8)

    assert images.tobytes() == again.tobytes()
    assert labels.tobytes() == labels_again.tobytes()
    assert not np.isin(fingerprints(images), fingerprints(others)).any()


def test_the_bytes_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = garments.draw_split("train", 3_000)
    monkeypatch.setattr("fedlib.garments.os.cpu_count", lambda: 1)
    one_by_one, labels_one_by_one = garments.draw_split("train", 3_000)

    assert images.tobytes() == one_by_one.tobytes()
    assert labels.tobytes() == labels_one_by_one.tobytes()


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()
    garments.draw_split("test", 20)
    assert (np.random.get_state()[1] == before).all()


def test_train_and_test_share_no_image() -> None:
    train, _ = garments.draw_split("train", 4_000)
    test, _ = garments.draw_split("test", 4_000)
    assert not np.isin(fingerprints(train), fingerprints(test)).any()


def fingerprints(images: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    return np.array([image.tobytes() for image in images])


@pytest.mark.parametrize(("num_images", "counts"), [(5_000, {500}), (23, {2, 3}), (3, {0, 1})])
def test_classes_are_balanced_to_within_one_image(num_images: int, counts: set[int]) -> None:
    _, labels = garments.draw_split("train", num_images)
    assert set(np.bincount(labels, minlength=10).tolist()) == counts


def test_labels_are_shuffled() -> None:
    _, labels = garments.draw_split("train", 1_000)
    assert (np.diff(labels) == 0).mean() < 0.2  # 0.1 in a random order, 0.99 in a sorted one


def test_the_background_is_black_at_the_corners() -> None:
    images, _ = garments.draw_split("train", 2_000)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).all(axis=1).mean() > 0.9


def test_brightness_is_that_of_the_stated_constants() -> None:
    images, _ = garments.draw_split("train", 10_000)
    pixels = images / 255

    assert pixels.mean() == pytest.approx(garments.PIXEL_MEAN, abs=0.006)
    assert pixels.std() == pytest.approx(garments.PIXEL_STD, abs=0.006)
    assert pytest.approx(0.2860, abs=0.02) == garments.PIXEL_MEAN  # Fashion-MNIST's own
    assert pytest.approx(0.3530, abs=0.02) == garments.PIXEL_STD


def test_parquet_files_give_back_what_was_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    garments.write_parquet(folder, num_train=60, num_test=20, seed=5)
    dataset = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))

    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for split, size in (("train", 60), ("test", 20)):
        images, labels = garments.draw_split(split, size, seed=5)
        assert dataset[split].features == {
            "image": Image(),
            "label": ClassLabel(names=list(garments.CLASS_NAMES)),
        }
        assert dataset[split]["label"] == labels.tolist()
        assert (np.stack([np.asarray(image) for image in dataset[split]["image"]]) == images).all()


def test_parquet_files_have_the_schema_of_the_real_ones(tmp_path: Path, real_images: Path) -> None:
    garments.write_parquet(tmp_path, num_train=10, num_test=10)
    for file in FILES:
        schema = pq.read_schema(tmp_path / file)
        assert schema.equals(pq.read_schema(real_images / file), check_metadata=True)


def test_a_split_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'validation\''):
        garments.draw_split("validation", 10)


@pytest.mark.parametrize("num_images", [0, -1])
def test_a_size_below_one_is_refused(num_images: int, tmp_path: Path) -> None:
    message = f"num_images must be at least 1, got {num_images}"
    with pytest.raises(ValueError, match=message):
        garments.draw_split("train", num_images)
    with pytest.raises(ValueError, match=message):
        garments.draw_class(0, num_images, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        garments.write_parquet(tmp_path, num_train=num_images)


@pytest.mark.parametrize("label", [-1, 10])
def test_an_unknown_label_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label must be 0\.\.9, got {label}"):
        garments.draw_class(label, 1, np.random.default_rng(0))


def test_a_small_cnn_learns_the_classes(trained_model: CNN) -> None:
    images, labels = garments.draw_split("test", 2_000)
    assert accuracy(trained_model, images, labels) > LEAST_ACCURACY_ON_GARMENTS


def test_what_it_learns_holds_for_real_images(trained_model: CNN, real_images: Path) -> None:
    rows = [row for file in FILES for row in pq.read_table(real_images / file).to_pylist()]
    images = [np.asarray(PILImage.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    labels = np.array([row["label"] for row in rows])
    assert accuracy(trained_model, np.stack(images), labels) > LEAST_ACCURACY_ON_REAL_IMAGES
