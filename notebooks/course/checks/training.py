"""Notebook 02: the model and its local training."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course.verdict import Answer, check, expect
from fedlib.data import Split
from fedlib.model import CNN, State, clone_state, state_hash
from fedlib.training import Weighted, augment, single_thread, train


@check
def convolution_parameters(answer: Answer) -> None:
    """Parameters of a convolution with a square kernel and biases."""
    hint = "What does one output channel look at, and what does it add at the end?"
    expect("conv1: 1 channel to 16, kernel 5", answer(1, 16, 5), 416, hint)
    expect("3 channels to 8, kernel 3", answer(3, 8, 3), 224, hint)


@check
def mean_of_batches(answer: Answer) -> None:
    """The mean loss of all examples, from sums and counts."""
    hint = "How much does each example count?"
    expect("batches (6.0, 3) and (4.0, 1)", answer([(6.0, 3), (4.0, 1)]), 2.5, hint)
    expect("batches (5.0, 4) and (3.0, 3)", answer([(5.0, 4), (3.0, 3)]), 8 / 7, "Rounded?")
    expect("one batch (3.0, 2)", answer([(3.0, 2)]), 1.5, hint)


# --- the main exercise: 20 images of noise, which take six steps in batches of 8, 8, 4, 8, 8, 4

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "momentum": 0.8}
OTHERS: dict[str, Any] = {"epochs": 1, "batch_size": 5, "learning_rate": 0.1, "momentum": 0.0}
SIZES = [8, 8, 4, 8, 8, 4]
SEED = 11
FEDLIBS = "those of fedlib, in every bit"


class _WatchedCNN(CNN):
    """A model that remembers what it was given, and in which mode."""

    def __init__(self) -> None:
        super().__init__(torch.Generator().manual_seed(1))
        self.first = clone_state(self)
        self.seen: list[Tensor] = []
        self.modes: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        hint = "What turns pixels from 0 to 255 into numbers around 0?"
        expect("the type of what the model is given", str(x.dtype), "torch.float32", hint)
        self.seen.append(x.detach().clone())
        self.modes.append("train" if self.training else "eval")
        logits: Tensor = super().forward(x)
        return logits


def _noise() -> Split:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (20,), generator=generator), (0.3,), (0.35,))


@check
def local_training(answer: Answer) -> None:
    """A local training: the same weights as fedlib's, in every bit, and the loss as a sum."""
    with single_thread():
        model, split, generator = _WatchedCNN().eval(), _noise(), _generator()
        before = torch.get_rng_state()
        loss = answer(model, split, **SETTINGS, generator=generator)
        if loss is None and model.seen:
            expect("what it returns", "nothing", "a Weighted", "Is there a `return`?")
        came = ... if loss is None or loss is ... else type(loss).__name__
        expect("what it returns", came, "Weighted", "What holds a sum and a number?")
        _expect_its_own_chance(before, generator)
        expect("the images that it was given", _same(split.images, _noise().images), "unchanged")
        _expect_batches(model.seen, split)
        hint = "It came to you in the mode for evaluation. Who changes that?"
        expect("the model's mode in training", ", ".join(sorted({*model.modes})), "train", hint)
        _expect_weights(model)
        _expect_loss(loss)
        model, theirs = _WatchedCNN(), _WatchedCNN()
        answer(model, split, **OTHERS, generator=_generator())
        train(theirs, split, **OTHERS, generator=_generator())
        equal = state_hash(model.state_dict()) == state_hash(theirs.state_dict())
        hint = "Which number of the first case is written into it, or kept from there?"
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in OTHERS.items())
        expect(f"again with {settings}: the weights", FEDLIBS if equal else "others", FEDLIBS, hint)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _same(a: Tensor, b: Tensor) -> str:
    return "unchanged" if torch.equal(a, b) else "changed"


def _expect_its_own_chance(before: Tensor, generator: torch.Generator) -> None:
    hint = "Which of your calls draws at random without being given the generator?"
    expect("torch's global generator", _same(before, torch.get_rng_state()), "unchanged", hint)
    hint = "Its seed belongs to who calls. Who calls with the same one twice?"
    expect("the seed of the generator", str(generator.initial_seed()), str(SEED), hint)
    drawn = "unused" if torch.equal(generator.get_state(), _generator().get_state()) else "used"
    expect("the generator", drawn, "used", "What is drawn at random in an epoch, and by whom?")


def _expect_batches(seen: list[Tensor], split: Split) -> None:
    sizes = [len(batch) for batch in seen]
    questions = {
        "Was the model called that it was given, or a copy of it?": [],
        "What becomes of the images that are left over in an epoch?": [8, 8, 8, 8],
        "How many epochs were asked for?": [8, 8, 4],
        "Does a batch reach into the next epoch?": [8, 8, 8, 8, 8],
        "Where does the size of a batch come from?": [20, 20],
    }
    named = {slip: _list(value) for slip, value in questions.items()}
    question = "20 images, batches of 8, 2 epochs: the sizes of the batches"
    expect(question, _list(sizes), _list(SIZES), "Where does a batch begin and end?", named)
    generator = _generator()
    first = _epoch(split, generator)
    right = "put in order, cropped, normalised"
    hint = "What is drawn first, for how many images at once, and from which generator?"
    came = _name(torch.cat(seen[:3]), {right: first} | _other_epochs(split))
    expect("the images of the first epoch", came, right, hint)
    kept_order = torch.randperm(len(split), generator=_generator())
    again = torch.Generator()
    again.set_state(generator.get_state())
    second = {
        right: _epoch(split, generator),
        "those of the first epoch": first,
        "in the first epoch's order": _prepared(split, split.images[kept_order], again),
    }
    hint = "What is drawn anew in each epoch, and in which order?"
    expect("the images of the second epoch", _name(torch.cat(seen[3:]), second), right, hint)


def _list(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def _name(came: Any, known: Mapping[str, Any]) -> str:
    """Say which of these it is, but for rounding."""
    for name, value in known.items():
        pairs = zip(came, value, strict=False)
        if len(came) == len(value) and all(_close(a, b) for a, b in pairs):
            return name
    return "something else"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _prepared(split: Split, images: Tensor, generator: torch.Generator) -> Tensor:
    return split.normalize(augment(images, generator))


def _epoch(split: Split, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(split), generator=generator)
    return _prepared(split, split.images[order], generator)


def _other_epochs(split: Split) -> dict[str, Tensor]:
    """What likely mistakes make of the first epoch's images."""
    images, late, parts, given = split.images, _generator(), _generator(), _generator()
    order = torch.randperm(20, generator=parts)
    torch.randperm(20, generator=given)
    cropped = augment(images, late)
    ordered = augment(images[order], given)
    given.set_state(parts.get_state())
    unordered = _prepared(split, images, given)
    batches = [augment(part, parts) for part in torch.split(images[order], 8)]
    return {
        "in the order in which they were given": _prepared(split, images, _generator()),
        "in the order in which they were given, though another was drawn": unordered,
        "an order drawn after the crops": split.normalize(
            cropped[torch.randperm(20, generator=late)]
        ),
        "cropped before they were put in order": unordered[order],
        "cropped batch by batch": split.normalize(torch.cat(batches)),
        "put in order and normalised, but not cropped": split.normalize(images[order]),
        "put in order and cropped, but not normalised": ordered.float().unsqueeze(1),
        "put in order, cropped and divided by 255": ordered.float().unsqueeze(1) / 255,
    }


def _loop(
    *,
    zero: bool = True,
    one_optimizer: bool = True,
    reduction: str = "mean",
    labels_in_order: bool = True,
    learning_rate: float = 0.02,
    momentum: float = 0.8,
) -> tuple[State, list[float]]:
    """Train as asked, but for one mistake; return the weights and the losses of the batches."""
    model, split, generator = _WatchedCNN(), _noise(), _generator()

    def new_optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)

    optimizer, losses = new_optimizer(), list[float]()
    for _ in range(2):
        if not one_optimizer:
            optimizer = new_optimizer()
        order = torch.randperm(20, generator=generator)
        images = _prepared(split, split.images[order], generator)
        labels = split.labels[order] if labels_in_order else split.labels
        for batch in torch.split(torch.arange(20), 8):
            loss = F.cross_entropy(model(images[batch]), labels[batch], reduction=reduction)
            if zero:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    return clone_state(model), losses


WEIGHT_SLIPS: dict[str, Callable[[], tuple[State, list[float]]]] = {
    "What does `backward` do to gradients that are there already?": lambda: _loop(zero=False),
    "How long does an optimizer remember where the weights were going?": lambda: _loop(
        one_optimizer=False
    ),
    "Which step would a batch of half the size take: the sum of its losses, or their mean?": (
        lambda: _loop(reduction="sum")
    ),
    "The images were put in order. And their labels?": lambda: _loop(labels_in_order=False),
    "The momentum was not used: who wants to know it?": lambda: _loop(momentum=0.0),
    "Where do learning rate and momentum come from?": (
        lambda: _loop(learning_rate=0.05, momentum=0.9)
    ),
    "Where does the learning rate come from?": lambda: _loop(learning_rate=0.05),
    "Where does the momentum come from?": lambda: _loop(momentum=0.9),
}


def _expect_weights(model: _WatchedCNN) -> None:
    """Compare with fedlib's weights; where they differ, name the mistake that gives the same."""
    theirs = _WatchedCNN()
    train(theirs, _noise(), **SETTINGS, generator=_generator())
    wanted, came = theirs.state_dict(), model.state_dict()
    if state_hash(came) == state_hash(wanted):
        return
    hint = "Whose parameters does the optimizer hold, and what happens between `backward` and it?"
    moved = "as before" if state_hash(came) == state_hash(model.first) else "moved"
    expect("the weights after six steps", moved, "moved", hint)
    if _name(list(came.values()), {"right": list(wanted.values())}) == "right":
        hint = "Is the loss the mean that `cross_entropy` gives, and is the step SGD's?"
        expect("the weights", "the same but for their last bits", FEDLIBS, hint)
    hint = "Is there one step for each batch, from this batch's gradient alone?"
    for slip, loop in WEIGHT_SLIPS.items():
        if _name(list(came.values()), {"right": list(loop()[0].values())}) == "right":
            hint = slip
            break
    distance = max(float((came[key] - wanted[key]).abs().max()) for key in wanted)
    expect("the weights", f"others, off by up to {distance:.2g}", FEDLIBS, hint)


def _expect_loss(loss: Weighted) -> None:
    means = _loop()[1]
    slips: dict[str, Any] = {
        "Is it over every epoch?": 20,
        "Does a batch count, or an example?": len(SIZES),
    }
    question = "20 images, 2 epochs: "
    expect(f"{question}the weight of the loss", loss.weight, 40, "Over how many?", slips)
    number = "a float" if isinstance(loss.sum, float) else f"a {type(loss.sum).__name__}"
    expect(f"{question}the sum of the loss", number, "a float", "What makes a number of a tensor?")
    pairs = list(zip(means, SIZES, strict=True))
    sums = [mean * size for mean, size in pairs]
    slips = {
        "`cross_entropy` gives the mean of a batch. How many images does it stand for?": sum(means),
        "The last batch is smaller. Does the mean of means know that?": sum(means) / 6 * 40,
        "This is the mean. Who divides, and when?": sum(sums) / 40,
        "This is the mean of the batches' means. Who divides, and when?": sum(means) / 6,
        "Is it over every epoch?": sum(sums[3:]),
        "How many images has the last batch of an epoch?": sum(means) * 8,
    }
    hint = "What does each batch add?"
    expect(f"{question}the sum of the loss", loss.sum, sum(sums), hint, slips)
