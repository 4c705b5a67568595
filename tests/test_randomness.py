"""Generators named by seed, round, partition and purpose."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedlib import SERVER, Stream, numpy_generator, torch_generator

Name = tuple[int, int, int, Stream]
Draws = Callable[[Name], tuple[int, ...]]

NAMES: list[Name] = list(
    itertools.product((0, 1, 42, 2**32 - 1), (0, 1, 2), (SERVER, 0, 1, 49), Stream)
)
"""192 names: every seed with every round, partition and stream."""


def numpy_draws(name: Name) -> tuple[int, ...]:
    return tuple(numpy_generator(*name).integers(0, 2**62, size=4).tolist())


def torch_draws(name: Name) -> tuple[int, ...]:
    return tuple(torch.randint(0, 2**62, (4,), generator=torch_generator(*name)).tolist())


def global_states() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("draws", [numpy_draws, torch_draws])
def test_every_name_has_numbers_of_its_own_in_whatever_order_they_are_drawn(draws: Draws) -> None:
    before = global_states()
    forwards = {name: draws(name) for name in NAMES}
    assert len({number for numbers in forwards.values() for number in numbers}) == 4 * len(NAMES)
    assert global_states() == before
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert {name: draws(name) for name in reversed(NAMES)} == forwards


def test_generators_follow_from_numpys_seed_sequence() -> None:
    # Entropy: seed, round, partition + 1, stream; the server's partition counts as 0.
    node, server = (42, 3, 7, Stream.QUERY), (42, 3, SERVER, Stream.SAMPLE)
    assert numpy_generator(*node).random() == np.random.default_rng([42, 3, 8, 3]).random()
    assert numpy_generator(*server).random() == np.random.default_rng([42, 3, 0, 1]).random()
    state = np.random.SeedSequence([42, 3, 8, 3]).generate_state(1, np.uint64)
    assert torch_generator(*node).initial_seed() == int(state[0]) // 2
    assert torch_generator(*node).device.type == "cpu"
