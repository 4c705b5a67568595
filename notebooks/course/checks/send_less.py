"""Notebook 17: what is sent of an update, what is remembered, and what it costs."""

import hashlib
from typing import Any

import numpy as np

from course.verdict import Answer, check, expect
from fedlib.algorithms.compression import Vector
from fedlib.algorithms.compression import compress as fedlibs_compress

NUM_ROUNDS, NUM_VALUES = 4, 1_000


@check
def compress(answer: Answer) -> None:
    """The largest magnitudes of update + memory, and what they leave: by hand, then by hash."""
    empty = np.zeros(20, dtype=np.float32)
    update = np.linspace(0.1, 2, 20, dtype=np.float32) * np.tile([1, -1], 10).astype(np.float32)
    update[3], update[8] = 5, -7
    case = "20 values, nothing remembered yet"
    indices, values, rest = _parts(answer, update, empty, 0.1, case)
    _expect_sent(case, (indices, values), update, (np.array([3, 8]), update[[3, 8]]))
    left = np.where(np.isin(np.arange(20), [3, 8]), 0, update)
    hint = "Which values have not been sent?"
    expect(f"{case}: the new memory", rest, left, hint)
    _expect_types(case, indices, values, rest)

    memory = np.zeros(20, dtype=np.float32)
    memory[[0, 8, 10]] = 6, 6.5, -1
    case = "20 values, and a memory"
    indices, values, rest = _parts(answer, update, memory, 0.1, case)
    wanted = update + memory  # largest: 6.1 at 0, 5 at 3
    hint = "Which sum is compressed, if what was left out shall be made up for?"
    _expect_sent(case, (indices, values), update, (np.array([0, 3]), wanted[[0, 3]]), hint)
    right = np.where(np.isin(np.arange(20), [0, 3]), 0, wanted)
    sent = np.where(np.isin(np.arange(20), [0, 3]), wanted, 0)
    slips = {
        "Where has the old memory gone?": np.where(sent != 0, 0, update),
        "Is the sent part of this update all that leaves? The memory was sent too.": update - sent,
        "What was sent just now is not owed any more.": wanted,
    }
    expect(f"{case}: the new memory", rest, right, "What was not sent?", slips)

    case = "4 values"
    indices, *_ = _parts(answer, update[:4], memory[:4], 0.1, case)
    expect(f"{case}: how many are sent", len(indices), 1, "A tenth of 4 is 0, rounded.")

    rng = np.random.default_rng(17)
    mine = right_memory = np.zeros(NUM_VALUES, dtype=np.float32)
    for server_round in range(1, NUM_ROUNDS + 1):
        case = f"{NUM_VALUES} values, round {server_round} with the memory of the rounds before"
        update = rng.normal(size=NUM_VALUES).astype(np.float32)
        indices, values, mine = _parts(answer, update, mine, 0.05, case)
        *sent_by_fedlib, right_memory = fedlibs_compress(update, right_memory, 0.05)
        hint = "Is `share` used, and nothing rounded on the way?"
        _expect_sent(case, (indices, values), update, tuple(sent_by_fedlib), hint)
        _expect_types(case, indices, values, mine)
        expect(f"{case}: the memory's SHA-256", _digest(mine), _digest(right_memory), hint)


@check
def cheapest_bytes(answer: Answer) -> None:
    """The bytes of k values: with a place for each, or with one bit for each place."""
    for number, k in ((80_298, 8_030), (80_298, 803), (3_200, 100), (3_200, 101), (9, 5)):
        places, marks = 8 * k, -(-number // 8) + 4 * k
        slips = {
            "That is always with places. What do marks cost?": places,
            "That is always with marks. What do places cost?": marks,
            "A place is an int32. How many bytes has it?": 4 * k,
            "Bytes are whole: where do the last bits go?": min(places, number // 8 + 4 * k),
        }
        expect(f"{k:,} of {number:,} values", answer(number, k), min(places, marks), slips=slips)


def _parts(answer: Answer, update: Vector, memory: Vector, share: float, case: str) -> Any:
    got = answer(update, memory, share)
    if got is None or got is ... or not isinstance(got, tuple | list):
        expect(case, got, ("indices", "values", "memory"), "What are the three things to return?")
    expect(f"{case}: how many things are returned", len(got), 3)
    return tuple(np.asarray(part) for part in got)


def _expect_sent(case: str, got: Any, update: Vector, wanted: Any, hint: str = "") -> None:
    """Compare places and values; their order does not matter."""
    indices, values = got
    k = len(wanted[0])
    expect(f"{case}: how many places", indices.shape, (k,), "k is in the text above.")
    order = np.argsort(indices)
    largest = np.sort(np.argsort(update)[-k:])
    alone = np.sort(np.argsort(np.abs(update))[-k:])
    slips = {"Is -7 not larger than 5 here? Magnitude counts.": largest}
    slips |= {} if hint == "" else {"That is the update alone. What of the memory?": alone}
    expect(f"{case}: the places", indices[order], wanted[0], hint or "Which are largest?", slips)
    slips = {"Those are magnitudes. How does the server learn the sign?": np.abs(wanted[1])}
    slips["Those are the update's values. What of the memory?"] = update[wanted[0]]
    expect(f"{case}: the values", values[order], wanted[1], hint, slips)


def _expect_types(case: str, indices: Any, values: Any, rest: Any) -> None:
    hint = "How many bytes of it would travel?"
    expect(f"{case}: the dtype of the places", str(indices.dtype), "int32", hint)
    expect(f"{case}: the dtype of the values", str(values.dtype), "float32", hint)
    expect(f"{case}: the dtype of the memory", str(rest.dtype), "float32", "And update + memory?")


def _digest(vector: Vector) -> str:
    return hashlib.sha256((vector + 0.0).astype(np.float32).tobytes()).hexdigest()[:16]
