"""Notebook 15: masks that cancel, and how to take off those that do not."""

from hashlib import sha256
from typing import Any

import numpy as np

from course.verdict import Answer, check, expect
from fedlib.algorithms.masks import Integers, keystream, mask, recover

NODES = (2, 7, 11)
LARGE = (2**62 + 5, 2**40, 9)  # as real ids are
LENGTH = 6


def seed_of(one: int, other: int) -> bytes:
    """Return a seed for a pair of nodes, the same from both sides."""
    return sha256(repr(sorted((one, other))).encode()).digest()


def seeds_of(own_id: int, nodes: tuple[int, ...] = NODES) -> dict[int, bytes]:
    """Return the seeds that a node shares with the others."""
    return {other: seed_of(own_id, other) for other in nodes if other != own_id}


def digest(integers: Integers) -> str:
    """Return the first letters of a hash of whole numbers."""
    return sha256(np.ascontiguousarray(integers).tobytes()).hexdigest()[:12]


@check
def pair_masks(answer: Answer) -> None:
    """The mask of one node: a stream for each other node, added or subtracted."""
    stream = keystream(seed_of(2, 7), LENGTH)
    got = answer(2, {7: seed_of(2, 7)}, LENGTH)
    _expect_integers("node 2, which shares a seed with node 7", got, LENGTH)
    hint = "Which stream follows from their seed?"
    slips = {
        "Which of the two nodes adds?": -stream,
        "Is the stream in the mask?": np.zeros(LENGTH, np.uint32),
    }
    expect("node 2, which shares a seed with node 7", got, stream, hint, slips)
    slips = {"Both nodes of the pair add it. What is left in the sum?": stream}
    got = answer(7, {2: seed_of(2, 7)}, LENGTH)
    _expect_integers("node 7, which shares it with node 2", got, LENGTH)
    expect("node 7, which shares it with node 2", got, -stream, hint, slips)
    for own_id in NODES:
        seeds = seeds_of(own_id)
        wanted, got = mask(own_id, seeds, LENGTH), answer(own_id, seeds, LENGTH)
        first, last = (mask(own_id, {i: seeds[i]}, LENGTH) for i in (min(seeds), max(seeds)))
        slips = {
            "What becomes of the first stream when the second comes?": last,
            "Is there a stream for every other node?": first,
        }
        question = f"node {own_id} of nodes {', '.join(map(str, NODES))}"
        expect(question, got, wanted, "Which of the streams are added?", slips)
    masks = [answer(own_id, seeds_of(own_id), LENGTH) for own_id in NODES]
    _expect_integers("the last of three masks", masks[-1], LENGTH)
    zeros = np.zeros(LENGTH, np.uint32)
    expect("the sum of three masks", sum(masks, zeros), zeros, "Does every stream cancel?")
    for own_id in LARGE:
        seeds = seeds_of(own_id, LARGE)
        got, wanted = answer(own_id, seeds, 5000), mask(own_id, seeds, 5000)
        _expect_integers(f"node {own_id}, 5,000 numbers", got, 5000)
        hint = "Is the order of the ids taken as numbers?"
        expect(f"node {own_id}, 5,000 numbers: hash", digest(got), digest(wanted), hint)


@check
def take_masks_off(answer: Answer) -> None:
    """The sum over the survivors, without the masks they share with those who dropped out."""
    for nodes, dropped in ((NODES, {7}), (NODES, {2}), ((*NODES, 1, 30), {11, 1}), (NODES, set())):
        left = [node for node in nodes if node not in dropped]
        values = {node: keystream(node.to_bytes(32, "big"), LENGTH) for node in left}
        wanted = np.sum(np.stack(list(values.values())), axis=0, dtype=np.uint32)
        masked = [values[i] + mask(i, seeds_of(i, nodes), LENGTH) for i in left]
        total: Integers = np.sum(np.stack(masked), axis=0, dtype=np.uint32)
        revealed = {i: {j: seed_of(i, j) for j in dropped} for i in left}
        few = {i: dict(list(seeds.items())[:1]) for i, seeds in revealed.items()}
        one = dict(list(revealed.items())[:1])
        slips = {
            "Whose masks are still in it?": total,
            "These masks are in the sum. Do you add them once more?": total + (total - wanted),
            "Is one survivor enough?": recover(total, one),
            "Is one of those who dropped out enough?": recover(total, few),
        }
        slips = slips if dropped else {}
        gone = ", ".join(map(str, sorted(dropped))) or "nobody"
        question = f"nodes {', '.join(map(str, sorted(nodes)))}, of whom {gone} dropped out"
        got = answer(total, revealed)
        _expect_integers(question, got, LENGTH)
        expect(question, got, wanted, "Which masks does the sum still have?", slips)


def _expect_integers(question: str, got: Any, length: int) -> None:
    """Expect an array of whole numbers modulo 2**32; an untouched stub passes on."""
    if got is None or got is ...:
        expect(question, got, 0)
    array = np.asarray(got)
    hint = "Where do the numbers wrap? Zeros of which dtype does the sum begin with?"
    expect(f"{question}: dtype", str(array.dtype), "uint32", hint)
    expect(f"{question}: shape", list(array.shape), [length], "How many numbers has a mask?")
