"""Augmentation, training and evaluation against torchvision and naive loops."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as tv

import fedlib
from fedlib import CNN, Split, Weighted, augment, clone_state, evaluate, state_hash, train
from fedlib.training import EVALUATION_BATCH_SIZE, PADDING, single_thread

GREY, COLOUR = (28, 28), (20, 17, 3)
SHAPES = pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_split(num_examples: int, shape: tuple[int, ...] = GREY) -> Split:
    size = (num_examples, *shape)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator())
    labels = torch.randint(0, 10, (num_examples,), generator=generator(1))
    channels = 1 if len(shape) == 2 else shape[2]
    return Split(images, labels, mean=(0.5, 0.4, 0.3)[:channels], std=(0.29, 0.2, 0.1)[:channels])


def new_model(shape: tuple[int, ...] = GREY, seed: int = 1) -> CNN:
    height, width, channels = (*shape, 1)[:3]
    return CNN(generator(seed), (channels, height, width))


def channels_first(image: Tensor) -> Tensor:
    return image[None] if image.ndim == 2 else image.movedim(-1, 0)


def torchvisions(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    """Pad, crop and flip one image with torchvision, which wants the channels first."""
    padded = tv.pad(channels_first(image), [4, 4, 4, 4], fill=0)
    cropped = tv.crop(padded, top, left, *image.shape[:2])
    return tv.hflip(cropped) if flip else cropped


@SHAPES
def test_crop_and_flip_equals_torchvision_at_every_offset(shape: tuple[int, ...]) -> None:
    assert PADDING == 4
    places = [(top, left, flip) for top in range(9) for left in range(9) for flip in (0, 1)]
    images = random_split(len(places), shape).images
    before = images.clone()
    result = fedlib.crop_and_flip(
        images,
        torch.tensor([[top, left] for top, left, _ in places]),
        torch.tensor([bool(flip) for *_, flip in places]),
    )
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    assert torch.equal(images, before)
    for image, (top, left, flip), came in zip(images, places, result, strict=True):
        assert torch.equal(channels_first(came), torchvisions(image, top, left, bool(flip)))


@SHAPES
def test_augment_draws_each_offset_and_flip_equally_often(shape: tuple[int, ...]) -> None:
    # One white pixel shows where each image went.
    images = torch.zeros(18_000, *shape, dtype=torch.uint8)
    images[:, 13, 6] = 255
    places = augment(images, generator()).reshape(18_000, *shape[:2], -1)[..., 0].nonzero()
    rows, columns = places[:, 1], places[:, 2]
    # With offset 0..8 the row is 13 + 4 - offset; the column 6 + 4 - offset, or mirrored.
    mirrored = set(range(shape[1] - 11, shape[1] - 2))
    assert set(rows.tolist()) == set(range(9, 18))
    assert set(columns.tolist()) == set(range(2, 11)) | mirrored
    counts = torch.bincount(rows)[9:].double()
    assert len(places) == 18_000 and float((counts - 2_000).abs().max()) < 5 * math.sqrt(2_000)
    right, both = columns > 10, mirrored & set(range(11))  # in the middle it may be either
    share = int(right.sum()) / (18_000 * (9 - len(both)) / 9)
    assert share == pytest.approx(0.5, abs=0.02)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


def naive_train(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    generator: torch.Generator,
    augmentation: bool = True,
) -> Weighted:
    """PyTorch's own optimizer on images that torchvision prepares one at a time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    loss_sum, n = 0.0, len(split)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).tolist()
        images = [channels_first(split.images[index]) for index in order]
        if augmentation:
            offsets = torch.randint(0, 9, (n, 2), generator=generator).tolist()
            flips = (torch.rand(n, generator=generator) < 0.5).tolist()
            drawn = zip(order, offsets, flips, strict=True)
            images = [torchvisions(split.images[i], *place, flip) for i, place, flip in drawn]
        rows = [tv.normalize(image / 255, split.mean, split.std) for image in images]
        for start in range(0, n, batch_size):
            batch, chosen = (
                torch.stack(rows[start : start + batch_size]),
                order[start:][:batch_size],
            )
            losses = -model(batch).log_softmax(1)[range(len(chosen)), split.labels[chosen]]
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            loss_sum += losses.double().sum().item()
    return Weighted(loss_sum, n * epochs)


@pytest.mark.parametrize(
    ("num_examples", "options"),
    [
        (50, {"epochs": 2}),  # the last batch is smaller
        (48, {"momentum": 0.0}),
        (7, {"batch_size": 32, "epochs": 3}),
        (9, {"batch_size": 8}),
        (1, {"epochs": 2}),
        (20, {"augmentation": False, "epochs": 2}),
        (50, {"shape": COLOUR}),
        (20, {"shape": COLOUR, "augmentation": False, "epochs": 2}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread")
def test_train_equals_a_naive_loop(num_examples: int, options: dict[str, Any]) -> None:
    shape = options.get("shape", GREY)
    split, ours, naive = random_split(num_examples, shape), new_model(shape), new_model(shape)
    before, images, rng = clone_state(ours), split.images.clone(), torch.get_rng_state()
    fixed = {"epochs": 1, "batch_size": 16, "learning_rate": 0.02, "momentum": 0.9}
    options = fixed | {key: value for key, value in options.items() if key != "shape"}
    loss = train(ours, split, generator=generator(2), **options)
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(split.images, images)
    expected = naive_train(naive, split, generator=generator(2), **options)
    assert loss.weight == expected.weight == num_examples * options["epochs"]
    assert loss.sum == pytest.approx(expected.sum, rel=1e-5)
    for name, tensor in ours.state_dict().items():
        assert not torch.equal(tensor, before[name])
        assert torch.allclose(tensor, naive.state_dict()[name], rtol=1e-4, atol=1e-6)


class Biased(nn.Module):
    """Always the same logits: 1/2 for class 0, 1/18 for each of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([math.log(9)] + [0.0] * 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 10)


def quick_train(model: nn.Module, split: Split, seed: int = 5, **options: Any) -> Weighted:
    fixed = {"epochs": 1, "batch_size": 8, "learning_rate": 0.05, "momentum": 0.9}
    return train(model, split, generator=generator(seed), **{**fixed, **options})


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 9])
def test_training_loss_is_weighted_by_examples_not_by_batches(batch_size: int) -> None:
    split = random_split(5)
    split.labels[:] = torch.tensor([0, 0, 0, 0, 3])
    loss = quick_train(Biased(), split, batch_size=batch_size, epochs=2, learning_rate=1e-30)
    assert loss.weight == 10
    assert loss.sum == pytest.approx(2 * (4 * math.log(2) + math.log(18)), rel=1e-6)


def test_nothing_but_weights_and_generator_decides_what_training_makes() -> None:
    """Neither the global generator, nor an earlier training's momentum, nor an evaluation."""
    split, model, copy = random_split(24), new_model(), new_model(seed=9)
    quick_train(model, split, seed=1)
    copy.load_state_dict(clone_state(model))
    evaluate(copy, split)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        losses = [quick_train(each, split, seed=2) for each in (model, copy)]
    assert losses[0] == losses[1]
    assert state_hash(model.state_dict()) == state_hash(copy.state_dict())


def moody_model() -> nn.Module:
    """A model that answers otherwise in ``train()`` mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), nn.Linear(784, 10)
        )
        model[1].running_mean.uniform_(-1, 1)
    return model.train()


@pytest.mark.parametrize("num_examples", [1, EVALUATION_BATCH_SIZE, EVALUATION_BATCH_SIZE + 1, 450])
def test_evaluate_equals_a_loop_over_single_examples(num_examples: int) -> None:
    split, model, rng = random_split(num_examples), moody_model(), torch.get_rng_state()
    before = state_hash(clone_state(model))
    result = evaluate(model, split)
    assert not model.training and state_hash(clone_state(model)) == before
    assert torch.equal(torch.get_rng_state(), rng)
    loss_sum, num_correct = 0.0, 0
    with torch.no_grad():
        for image, label in zip(split.images, split.labels, strict=True):
            normalised = tv.normalize(image[None, None].double() / 255, split.mean, split.std)
            probabilities = model(normalised.float())[0].double().softmax(dim=0)
            loss_sum -= math.log(probabilities[label])
            num_correct += int(probabilities.argmax() == label)
    assert result.loss.weight == result.correct.weight == num_examples
    assert result.correct.sum == num_correct
    assert result.loss.sum == pytest.approx(loss_sum, rel=1e-5)
    assert result.accuracy == num_correct / num_examples
    assert result.loss.mean == result.loss.sum / num_examples


def test_one_thread_gives_the_same_bits_and_hands_the_others_back() -> None:
    split, before, found = random_split(96), torch.get_num_threads(), set()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            with single_thread():
                assert torch.get_num_threads() == 1
                model = new_model()
                loss = quick_train(model, split)
                evaluation = evaluate(model, split)
            assert torch.get_num_threads() == num_threads
            found.add((state_hash(model.state_dict()), loss, evaluation))
            with pytest.raises(KeyError), single_thread():
                raise KeyError("inside")
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


class Moving(CNN):
    """Moves for real on a machine without a GPU: to another dtype in place of a device."""

    def to(self, *_: Any, **__: Any) -> "Moving":
        return super().to(torch.float64)


def test_a_model_that_was_evaluated_can_be_trained(one_thread: None) -> None:
    split, model = random_split(16), Moving(generator(1))
    evaluate(model, split)
    before = clone_state(model)
    assert all(not parameter.is_inference() for parameter in model.parameters())
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 0.1, "momentum": 0.9}
    train(model, split, generator=generator(2), **settings)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_trained_and_evaluated(
    dtype: torch.dtype, one_thread: None
) -> None:
    split = random_split(64)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}
    found = []
    for model in (new_model(), new_model().to(dtype)):
        loss = train(model, split, momentum=0.9, generator=generator(2), **settings)
        found.append((loss.mean, evaluate(model, split).loss.mean))
        assert all(math.isfinite(value) for value in found[-1])
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_an_operation_without_a_reproducible_form_is_named_and_computed() -> None:
    grow = nn.Upsample(scale_factor=2, mode="bicubic")  # its gradient adds in any order
    model = nn.Sequential(nn.Conv2d(1, 2, 3), grow, nn.Flatten(), nn.Linear(2 * 52 * 52, 10))
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}
    with pytest.warns(UserWarning, match="bicubic.* deterministic"):
        loss = train(
            model, random_split(16), momentum=0.9, generator=generator(), device="cuda", **settings
        )
    assert math.isfinite(loss.mean)
