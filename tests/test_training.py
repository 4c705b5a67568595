"""Augmentation, training and evaluation against torchvision and naive loops."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import functional as tv

from fedlib.data import Split
from fedlib.model import CNN, clone_state, state_hash
from fedlib.training import (
    EVALUATION_BATCH_SIZE,
    PADDING,
    Evaluation,
    Weighted,
    augment,
    crop_and_flip,
    evaluate,
    single_thread,
    train,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(num_images: int, seed: int = 0, side: tuple[int, int] = (28, 28)) -> Tensor:
    return torch.randint(0, 256, (num_images, *side), dtype=torch.uint8, generator=generator(seed))


def random_split(num_examples: int, seed: int = 0) -> Split:
    labels = torch.randint(0, 10, (num_examples,), generator=generator(seed + 1))
    return Split(random_images(num_examples, seed), labels, mean=0.5, std=0.29)


def torchvision_crop_and_flip(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    height, width = image.shape
    padded = tv.pad(image[None], [4, 4, 4, 4], fill=0)
    cropped = tv.crop(padded, top, left, height, width)
    return (tv.hflip(cropped) if flip else cropped)[0]


def test_crop_and_flip_equals_torchvision_at_every_offset() -> None:
    assert PADDING == 4
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (0, 1)]
    images = random_images(len(corners))
    offsets = torch.tensor([[top, left] for top, left, _ in corners])
    flips = torch.tensor([bool(flip) for *_, flip in corners])
    result = crop_and_flip(images, offsets, flips)
    assert result.dtype == torch.uint8
    assert result.shape == images.shape
    for image, (top, left, flip), came in zip(images, corners, result, strict=True):
        assert torch.equal(came, torchvision_crop_and_flip(image, top, left, bool(flip)))


def test_crop_and_flip_takes_images_that_are_not_square() -> None:
    images = random_images(4, side=(5, 9))
    offsets, flips = torch.tensor([[0, 8], [8, 0], [3, 5], [4, 4]]), torch.tensor([1, 0, 1, 1]) == 1
    result = crop_and_flip(images, offsets, flips)
    for i in range(4):
        top, left = offsets[i].tolist()
        expected = torchvision_crop_and_flip(images[i], top, left, bool(flips[i]))
        assert torch.equal(result[i], expected)


def test_the_middle_crop_without_a_flip_is_the_image_itself() -> None:
    images = random_images(3)
    same = crop_and_flip(images, torch.full((3, 2), PADDING), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(same, images)


def test_crop_and_flip_leaves_its_input_alone() -> None:
    images = random_images(3)
    before = images.clone()
    crop_and_flip(images, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    assert torch.equal(images, before)


def test_augment_draws_each_offset_and_flip_equally_often() -> None:
    # One white pixel in the middle shows where each image went.
    images = torch.zeros(18_000, 28, 28, dtype=torch.uint8)
    images[:, 13, 10] = 255
    places = augment(images, generator()).nonzero()
    assert len(places) == 18_000
    # With offset 0..8 the row is 13 + 4 - offset; the column 10 + 4 - offset, or mirrored.
    rows, columns = places[:, 1], places[:, 2]
    assert set(rows.tolist()) == set(range(9, 18))
    assert set(columns.tolist()) == set(range(6, 15)) | set(range(13, 22))
    counts = torch.bincount(rows)[9:].double()
    assert float((counts - 2_000).abs().max()) < 5 * math.sqrt(2_000)
    # The mirrored columns are 27 - (14 - offset) = 13 + offset; 13 and 14 may be either.
    mirrored = int((columns > 14).sum()) / (18_000 * 7 / 9)
    assert mirrored == pytest.approx(0.5, abs=0.02)


def test_augment_uses_only_its_generator() -> None:
    images, before = random_images(20), torch.get_rng_state()
    first, again, other = (augment(images, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


def naive_train(
    model: nn.Module,
    split: Split,
    draws: torch.Generator,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
) -> float:
    """SGD with momentum written out, on images that torchvision augments one at a time."""
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    loss_sum, n = 0.0, len(split)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(n, generator=draws).tolist()
        offsets = torch.randint(0, 9, (n, 2), generator=draws).tolist()
        coins = torch.rand(n, generator=draws).tolist()
        rows = []
        for index, (top, left), coin in zip(order, offsets, coins, strict=True):
            image = torchvision_crop_and_flip(split.images[index], top, left, coin < 0.5)
            rows.append(tv.normalize(image[None].float() / 255, [split.mean], [split.std]))
        dataset = TensorDataset(torch.stack(rows), split.labels[order])
        for images, labels in DataLoader(dataset, batch_size):
            log_probabilities = model(images).log_softmax(dim=1)
            losses = -log_probabilities[range(len(labels)), labels]
            model.zero_grad()
            losses.mean().backward()
            loss_sum += losses.double().sum().item()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    velocity[name] = momentum * velocity[name] + parameter.grad
                    parameter -= learning_rate * velocity[name]
    return loss_sum


@pytest.mark.parametrize(
    ("num_examples", "epochs", "batch_size"),
    [(50, 2, 16), (48, 1, 16), (7, 3, 32), (9, 2, 8), (1, 2, 4)],
    ids=["ragged", "even", "batch above data", "last batch of one", "one example"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.usefixtures("one_thread")
def test_train_equals_a_naive_loop(
    num_examples: int, epochs: int, batch_size: int, momentum: float
) -> None:
    split = random_split(num_examples)
    ours, naive = CNN(generator(1)), CNN(generator(1))
    before = clone_state(ours)
    loss = train(
        ours,
        split,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=0.02,
        momentum=momentum,
        generator=generator(2),
    )
    loss_sum = naive_train(
        naive,
        split,
        generator(2),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=0.02,
        momentum=momentum,
    )
    assert loss.weight == num_examples * epochs
    assert loss.sum == pytest.approx(loss_sum, rel=1e-5)
    for (name, tensor), expected in zip(
        ours.state_dict().items(), naive.state_dict().values(), strict=True
    ):
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


class Zero(nn.Module):
    """Always the same logits: the loss of a batch is known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 10)


def test_training_loss_is_weighted_by_examples_not_by_batches() -> None:
    split = random_split(5)
    split = Split(split.images, torch.tensor([0, 0, 0, 0, 3]), split.mean, split.std)
    model = Zero()
    with torch.no_grad():
        model.logits[0] = math.log(9)  # class 0: 1/2, the others: 1/18
    for batch_size in (1, 2, 4, 5, 9):
        loss = train(
            model,
            split,
            epochs=2,
            batch_size=batch_size,
            learning_rate=1e-30,
            momentum=0.0,
            generator=generator(),
        )
        assert loss.weight == 10
        assert loss.sum == pytest.approx(2 * (4 * math.log(2) + math.log(18)), rel=1e-6)


def quick_train(model: nn.Module, split: Split, seed: int = 5) -> Weighted:
    return train(
        model,
        split,
        epochs=1,
        batch_size=8,
        learning_rate=0.05,
        momentum=0.9,
        generator=generator(seed),
    )


def test_same_generator_gives_the_same_bits_whatever_the_global_seed() -> None:
    split, hashes = random_split(40), []
    with torch.random.fork_rng():
        for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
            torch.manual_seed(global_seed)
            model = CNN(generator(1))
            before = torch.get_rng_state()
            quick_train(model, split, seed)
            assert torch.equal(torch.get_rng_state(), before)
            hashes.append(state_hash(model.state_dict()))
    assert hashes[0] == hashes[1] != hashes[2]


def test_momentum_does_not_outlive_a_call() -> None:
    """Two calls equal two calls on a copy: nothing but the weights is carried over."""
    split, model = random_split(24), CNN(generator(1))
    quick_train(model, split, seed=1)
    copy = CNN(generator(9))
    copy.load_state_dict(clone_state(model))
    for each in (model, copy):
        quick_train(each, split, seed=2)
    assert state_hash(model.state_dict()) == state_hash(copy.state_dict())


def test_train_leaves_the_data_alone() -> None:
    split = random_split(24)
    images, labels = split.images.clone(), split.labels.clone()
    quick_train(CNN(generator(1)), split)
    assert torch.equal(split.images, images)
    assert torch.equal(split.labels, labels)


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
    split, model = random_split(num_examples), moody_model()
    result = evaluate(model, split)
    assert not model.training
    loss_sum, num_correct = 0.0, 0
    with torch.no_grad():
        for image, label in zip(split.images, split.labels, strict=True):
            normalised = tv.normalize(image[None, None].double() / 255, [split.mean], [split.std])
            probabilities = model(normalised.float())[0].double().softmax(dim=0)
            loss_sum -= math.log(probabilities[label])
            num_correct += int(probabilities.argmax() == label)
    assert result.loss.weight == result.correct.weight == num_examples
    assert result.correct.sum == num_correct
    assert result.loss.sum == pytest.approx(loss_sum, rel=1e-5)
    assert result.accuracy == num_correct / num_examples
    assert result.loss.mean == result.loss.sum / num_examples


def test_evaluation_changes_no_parameter_buffer_or_global_generator() -> None:
    split, model, rng = random_split(30), moody_model(), torch.get_rng_state()
    before = state_hash(clone_state(model))
    evaluate(model, split)
    assert state_hash(clone_state(model)) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_can_be_trained_after_it_was_evaluated() -> None:
    split, evaluated, fresh = random_split(24), CNN(generator(1)), CNN(generator(1))
    evaluate(evaluated, split)
    assert quick_train(evaluated, split) == quick_train(fresh, split)
    assert state_hash(evaluated.state_dict()) == state_hash(fresh.state_dict())


def test_evaluation_of_nothing_has_no_mean() -> None:
    empty = Split(random_images(0), torch.zeros(0, dtype=torch.int64), 0.5, 0.3)
    result = evaluate(CNN(generator()), empty)
    assert result == Evaluation(Weighted(0.0, 0), Weighted(0, 0))
    assert math.isnan(result.accuracy)
    assert math.isnan(result.loss.mean)


def test_mean_is_the_sum_over_the_weight() -> None:
    assert Weighted(7.5, 3).mean == 2.5
    assert math.isnan(Weighted(0.0, 0).mean)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_single_thread_holds_inside_the_block_only() -> None:
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_single_thread_gives_the_threads_back_after_an_exception() -> None:
    with pytest.raises(KeyError), single_thread():
        raise KeyError("inside")
    assert torch.get_num_threads() == 3


def trained_hash() -> str:
    """Train and evaluate on one thread; also called by a process of its own, below."""
    model, split = CNN(generator(1)), random_split(96)
    with single_thread():
        loss = train(
            model,
            split,
            epochs=1,
            batch_size=32,
            learning_rate=0.05,
            momentum=0.9,
            generator=generator(2),
        )
        result = evaluate(model, split)
    return f"{state_hash(model.state_dict())} {loss.sum.hex()} {result.loss.sum.hex()}"


@pytest.mark.usefixtures("three_threads")
def test_single_thread_gives_the_bits_of_a_process_with_one_thread() -> None:
    process = subprocess.run(
        [sys.executable, "-c", "import test_training; print(test_training.trained_hash())"],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert process.stdout.strip() == trained_hash()
