"""The check of notebook 17's main exercise: right means pass, wrong ones hear their mistake."""

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from course import checks
from fedlib.algorithms import compression

Compress = Callable[..., Any]


def compress(
    wish: Callable[[Any, Any], Any] = lambda update, memory: update + memory,
    size: Callable[[Any], Any] = np.abs,
    number: Callable[[float], int] = lambda wished: max(1, round(wished)),
    sent: Callable[[Any, Any], Any] = lambda values, update: values,
    rest: Callable[[Any, Any, Any, Any], Any] | None = None,
    place: type = np.int32,
) -> Compress:
    """The notebook's solution, with parts of it exchanged."""

    def my_compress(update: Any, memory: Any, share: float = 0.1) -> Any:
        wanted = wish(update, memory)
        k = number(share * len(update))
        places = np.argsort(-size(wanted))[:k].astype(place)
        values = sent(wanted[places], update[places])
        left = wanted.copy()
        left[places] = 0
        return places, values, rest(update, memory, wanted, left) if rest else left

    return my_compress


def with_torch(update: Any, memory: Any, share: float = 0.1) -> Any:
    wanted = torch.from_numpy(update + memory)
    k = max(1, round(share * len(update)))
    places = torch.topk(wanted.abs(), k).indices
    values = wanted[places].clone()
    return places.int().numpy(), values.numpy(), wanted.index_fill(0, places, 0).numpy()


def with_a_heap(update: Any, memory: Any, share: float = 0.1) -> Any:
    wanted = [float(value) for value in update + memory]
    k = max(1, round(share * len(wanted)))
    places = heapq.nlargest(k, range(len(wanted)), key=lambda place: abs(wanted[place]))
    rest = [0.0 if place in set(places) else value for place, value in enumerate(wanted)]
    values = np.array([wanted[place] for place in places], dtype=np.float32)
    return np.array(places, dtype=np.int32), values, np.array(rest, dtype=np.float32)


def with_a_difference(update: Any, memory: Any, share: float = 0.1) -> list[Any]:
    """A list, the places in ascending order, and the rest as a difference."""
    wanted = update + memory
    k = max(1, round(share * len(wanted)))
    places = np.sort(np.argpartition(np.abs(wanted), -k)[-k:]).astype(np.int32)
    sent = np.zeros_like(wanted)
    sent[places] = wanted[places]
    return [places, wanted[places], wanted - sent]


def in_place(update: Any, memory: Any, share: float = 0.1) -> Any:
    memory += update
    return compress()(memory, np.zeros_like(memory), share)


RIGHT = {
    "as in the notebook": compress(),
    "fedlib's": compression.compress,
    "PyTorch": with_torch,
    "a heap": with_a_heap,
    "a difference": with_a_difference,
}

WRONG: dict[str, tuple[Any, str]] = {
    "no memory": (compress(wish=lambda update, memory: update.copy()), "the update alone"),
    "not by magnitude": (compress(size=lambda values: values), "Magnitude counts."),
    "none of few": (compress(number=round), "how many are sent: expected 1, got 0"),
    "always a tenth": (compress(number=lambda wished: 2), "how many are sent"),
    "magnitudes": (compress(sent=lambda values, _: np.abs(values)), "learn the sign?"),
    "values of the update": (compress(sent=lambda _, update: update), "the update's values"),
    "nothing left out": (compress(rest=lambda u, m, wanted, left: wanted), "not been sent?"),
    "all forgotten": (compress(rest=lambda u, m, w, left: 0 * left), "Which values have not"),
    "the old memory is lost": (
        compress(rest=lambda u, m, w, left: np.where(left != 0, u, 0)),
        "Where has the old memory gone?",
    ),
    "the update less what was sent": (
        compress(rest=lambda u, m, wanted, left: u - (wanted - left)),
        "The memory was sent too.",
    ),
    "long places": (compress(place=np.int64), "places: expected 'int32', got 'int64'"),
    "double": (
        compress(rest=lambda u, m, w, left: left.astype(float)),
        "memory: expected 'float32', got 'float64'",
    ),
    "in place": (in_place, "changes its argument"),
    "two things": (lambda *given: compress()(*given)[:2], "how many things are returned"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    used = checks.compress(RIGHT[name], otherwise=compression.compress)
    assert used is RIGHT[name], capsys.readouterr().out
    assert "The cells below use yours." in capsys.readouterr().out


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_hears_its_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, words = WRONG[name]
    assert checks.compress(answer, otherwise=compression.compress) is compression.compress
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("❌")
    assert words in line
