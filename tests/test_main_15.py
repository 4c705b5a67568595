"""The checks of notebook 15's exercises: right masks pass, wrong ones hear their mistake."""

from functools import reduce
from typing import Any

import numpy as np
import pytest

from course import checks
from fedlib.algorithms.masks import keystream, mask, recover


def in_python(own_id: int, seeds: Any, length: int) -> Any:
    """Python's own numbers, wrapped at the end."""
    total = [0] * length
    for other in seeds:
        sign = 1 if other > own_id else -1
        total = [
            t + sign * int(s) for t, s in zip(total, keystream(seeds[other], length), strict=True)
        ]
    return np.array([t % 2**32 for t in total], dtype=np.uint32)


def in_int64(own_id: int, seeds: Any, length: int) -> Any:
    parts = (np.sign(i - own_id) * keystream(s, length).astype(np.int64) for i, s in seeds.items())
    return sum(parts, np.zeros(length, np.int64)).astype(np.uint32)


def in_place(own_id: int, seeds: Any, length: int) -> Any:
    total = np.zeros(length, dtype="uint32")
    for other, seed in sorted(seeds.items(), reverse=True):
        if other > own_id:
            total += keystream(seed, length)
        else:
            np.subtract(total, keystream(seed, length), out=total)
    return total


def by_negation(own_id: int, seeds: Any, length: int) -> Any:
    streams = [
        keystream(s, length) if own_id < i else ~keystream(s, length) + np.uint32(1)
        for i, s in seeds.items()
    ]
    return reduce(np.add, streams)


def reversed_signs(own_id: int, seeds: Any, length: int) -> Any:
    return -mask(own_id, seeds, length)


def wide(own_id: int, seeds: Any, length: int) -> Any:
    return mask(own_id, seeds, length).astype(np.int64)


def the_last(own_id: int, seeds: Any, length: int) -> Any:
    return mask(own_id, dict([max(seeds.items())]), length)


def the_first(own_id: int, seeds: Any, length: int) -> Any:
    return mask(own_id, dict([min(seeds.items())]), length)


def by_text(own_id: int, seeds: Any, length: int) -> Any:
    """The order of the ids as texts: 11 before 2."""
    total = np.zeros(length, np.uint32)
    for other, seed in seeds.items():
        stream = keystream(seed, length)
        total = total + stream if str(own_id) < str(other) else total - stream
    return total


def signed(own_id: int, seeds: Any, length: int) -> Any:
    return mask(own_id, seeds, length).view(np.int32)


def too_long(own_id: int, seeds: Any, length: int) -> Any:
    return mask(own_id, seeds, length + 1)


def emptied(own_id: int, seeds: Any, length: int) -> Any:
    total = np.zeros(length, np.uint32)
    while seeds:
        other, seed = seeds.popitem()
        total += mask(own_id, {other: seed}, length)
    return total


RIGHT = {
    "fedlib's": mask,
    "Python's numbers": in_python,
    "int64, then wrapped": in_int64,
    "in place": in_place,
    "by negation": by_negation,
}
WRONG: dict[str, tuple[Any, str]] = {
    "reversed": (reversed_signs, "Which of the two nodes adds?"),
    "nothing": (lambda own, seeds, length: np.zeros(length, np.uint32), "Is the stream in"),
    "all added": (
        lambda own, seeds, length: sum(keystream(seed, length) for seed in seeds.values()),
        "Both nodes of the pair add",
    ),
    "not wrapped": (wide, "Where do the numbers wrap?"),
    "signed": (signed, "expected 'uint32', got 'int32'"),
    "the last alone": (the_last, "when the second comes"),
    "the first alone": (the_first, "a stream for every other node"),
    "ids as texts": (by_text, "Which of the streams are added?"),
    "one number more": (too_long, "How many numbers has a mask?"),
    "its seeds emptied": (emptied, "it changes its argument"),
}


def by_hand(total: Any, revealed: Any) -> Any:
    total = total.copy()
    for survivor, seeds in revealed.items():
        for gone, seed in seeds.items():
            stream = keystream(seed, len(total))
            total += stream if gone < survivor else -stream
    return total


def as_the_lost_ones(total: Any, revealed: Any) -> Any:
    """What those who dropped out would have sent, beside their updates."""
    by_gone: dict[int, dict[int, bytes]] = {}
    for survivor, seeds in revealed.items():
        for gone, seed in seeds.items():
            by_gone.setdefault(gone, {})[survivor] = seed
    masks = [mask(gone, seeds, len(total)) for gone, seeds in by_gone.items()]
    return sum(masks, total)


def doubled(total: Any, revealed: Any) -> Any:
    masks = [mask(survivor, seeds, len(total)) for survivor, seeds in revealed.items()]
    return sum(masks, total)


def first_survivor(total: Any, revealed: Any) -> Any:
    return recover(total, dict(list(revealed.items())[:1]))


def first_lost_one(total: Any, revealed: Any) -> Any:
    return recover(total, {i: dict(list(seeds.items())[:1]) for i, seeds in revealed.items()})


def in_the_callers_total(total: Any, revealed: Any) -> Any:
    for survivor, seeds in revealed.items():
        total -= mask(survivor, seeds, len(total))
    return total


OFF = {"fedlib's": recover, "by hand": by_hand, "as the lost ones": as_the_lost_ones}
STILL_ON: dict[str, tuple[Any, str]] = {
    "nothing": (lambda total, revealed: total, "Whose masks are still in it?"),
    "doubled": (doubled, "Do you add them once more?"),
    "one survivor": (first_survivor, "Is one survivor enough?"),
    "one lost one": (first_lost_one, "Is one of those who dropped out enough?"),
    "in place": (in_the_callers_total, "it changes its argument"),
}


def verdict(name: str, answer: Any, ours: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    used = getattr(checks, name)(answer, otherwise=ours)
    line, which = capsys.readouterr().out.splitlines()
    assert which == f"   The cells below use {'yours' if used is answer else 'ours'}."
    return line


@pytest.mark.parametrize("name", RIGHT)
def test_right_masks_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict("pair_masks", RIGHT[name], mask, capsys).endswith("right.")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_hear_their_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = WRONG[name]
    line = verdict("pair_masks", answer, mask, capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("name", OFF)
def test_masks_that_are_off_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict("take_masks_off", OFF[name], recover, capsys).endswith("right.")


@pytest.mark.parametrize("name", STILL_ON)
def test_masks_still_on_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = STILL_ON[name]
    line = verdict("take_masks_off", answer, recover, capsys)
    assert line.startswith("❌")
    assert word in line
