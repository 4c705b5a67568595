"""Notebook 16: the private mean of updates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course.verdict import Answer, check, expect, on_error
from fedlib.algorithms.privacy import Privacy
from fedlib.algorithms.privacy import private_mean as right_mean
from fedlib.model import State, state_hash

Update = dict[str, Tensor]
Shorten = Callable[[Update], Update]
# Halves and quarters only: sums, norms and quotients are exact in any order, so the bits are fixed.
UPDATES = (
    {"w": [8.0, 8.0], "b": [8.0, 8.0]},  # norm 16
    {"w": [1.0, 1.0], "b": [1.0, 1.0]},  # norm 2
    {"w": [0.0, 0.0], "b": [-2.0, 0.0]},  # norm 2
)
CALM = Privacy(clip=4.0, noise_multiplier=0.0, expected=4.0)
NOISY = Privacy(clip=4.0, noise_multiplier=0.5, expected=8.0)


@check
def private_mean(answer: Answer) -> None:
    """Three updates without noise, with it, and one update of zeros; then the bits."""
    updates = [{k: torch.tensor(v) for k, v in update.items()} for update in UPDATES]
    came = answer(updates, CALM, _generator())
    slips = {
        "Was the first update clipped?": _mean(updates, lambda u: u),
        "Is one norm taken over all tensors of an update, or one of each?": _mean(
            updates, lambda u: {k: x * min(1.0, 4.0 / _norm({k: x})) for k, x in u.items()}
        ),
        "Is each value limited, and not the norm?": _mean(
            updates, lambda u: {k: x.clamp(-4, 4) for k, x in u.items()}
        ),
        "Does an update that is short enough become longer?": _mean(
            updates, lambda u: {k: x * 4.0 / _norm(u) for k, x in u.items()}
        ),
        "Are updates that are too long left out?": _mean(updates[1:], _clipped),
        "Is it divided by the number that came?": _mean(updates, _clipped, 3.0),
        "That is the sum.": _mean(updates, _clipped, 1.0),
        "Is the mean clipped, and not each update?": _clipped(_mean(updates, lambda u: u)),
    }
    question = "clip 4, no noise, 4 expected, updates of norm 16, 2 and 2"
    wanted = right_mean(updates, CALM, _generator())
    expect(question, came, _plain(wanted), "What is done to each update?", slips)
    _expect_bits("the hash of that mean", came, wanted)

    zeros = [{k: torch.zeros(2) for k in "wb"}]
    hint = "What is the norm of an update of zeros?"
    with on_error((ZeroDivisionError, ValueError), hint):
        came = answer(zeros, CALM, _generator())
    expect("one update of zeros", came, _plain(zeros[0]), hint)

    came = answer(updates, NOISY, _generator())
    question = "clip 4, noise multiplier 0.5, 8 expected, the first draw is "
    question += f"{torch.randn(2, generator=_generator())[0]:.3f}"
    clean = _mean(updates, _clipped, 8.0)
    wanted = right_mean(updates, NOISY, _generator())
    backwards = _with_noise(dict(reversed(clean.items())), 0.25)
    slips = {
        "Where is the noise?": clean,
        "The noise of the mean is smaller than that of the sum. By what?": _with_noise(clean, 2.0),
        "What has the clip to do with the noise?": _with_noise(clean, 0.5 / 8),
        "Is the multiplier used?": _with_noise(clean, 0.5),
        "How many are expected? That noise is divided by the number that came.": _with_noise(
            clean, 2.0 / 3
        ),
        "Is that one draw for a whole tensor?": _with_noise(clean, 0.25, single=True),
        "In which order are the tensors noised?": backwards,
        "Is each tensor's noise its own? The generator seems to begin anew.": {
            k: _with_noise({k: x}, 0.25)[k] for k, x in clean.items()
        },
        "Is each update noised? One draw for the mean is asked for.": _each_noised(updates),
    }
    expect(question, came, _plain(wanted), "Does `generator` draw the noise?", slips)
    _expect_bits("the hash of the noised mean", came, wanted)


def _expect_bits(question: str, came: State, wanted: State) -> None:
    got = state_hash({k: torch.as_tensor(x) for k, x in came.items()})
    hint = "Close, but not to the bit. Is something added to a norm, or another dtype used?"
    expect(question, got, state_hash(wanted), hint)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(16)


def _norm(update: State) -> float:
    """Return the norm, or next to nothing for zeros, so that one can divide by it."""
    squares = sum((x.square().sum() for x in update.values()), torch.zeros(()))
    return max(float(squares.sqrt()), 1e-9)


def _clipped(update: Update) -> Update:
    return {k: x * min(1.0, 4.0 / _norm(update)) for k, x in update.items()}


def _mean(updates: Sequence[Update], shorten: Shorten, number: float = 4.0) -> Update:
    short = [shorten(update) for update in updates]
    return {k: torch.stack([u[k] for u in short]).sum(0) / number for k in ("w", "b")}


def _with_noise(update: Update, std: float, single: bool = False) -> Update:
    generator = _generator()
    return {
        k: x + std * torch.randn(1 if single else x.shape, generator=generator)
        for k, x in update.items()
    }


def _each_noised(updates: Sequence[Update]) -> Update:
    generator = _generator()
    noised = [
        {k: x + 2.0 * torch.randn(x.shape, generator=generator) for k, x in _clipped(u).items()}
        for u in updates
    ]
    return _mean(noised, lambda u: u, 8.0)


def _plain(update: State) -> dict[str, Any]:
    return {k: x.tolist() for k, x in update.items()}
