"""Generators named by seed, round, partition and purpose."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedlib.randomness import SERVER, Stream, numpy_generator, torch_generator

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


@pytest.mark.parametrize("draws", [numpy_draws, torch_draws])
def test_every_name_has_numbers_of_its_own(draws: Draws) -> None:
    numbers = [draws(name) for name in NAMES]
    assert len(set(numbers)) == len(NAMES)
    assert len(set(itertools.chain.from_iterable(numbers))) == 4 * len(NAMES)


@pytest.mark.parametrize("draws", [numpy_draws, torch_draws])
def test_same_name_gives_the_same_numbers_in_any_order(draws: Draws) -> None:
    forwards = {name: draws(name) for name in NAMES}
    backwards = {name: draws(name) for name in reversed(NAMES)}
    assert forwards == backwards


def test_numpy_generator_follows_from_numpys_seed_sequence() -> None:
    # Entropy: seed, round, partition + 1, stream; the server's partition counts as 0.
    node = numpy_generator(42, 3, 7, Stream.QUERY)
    server = numpy_generator(42, 3, SERVER, Stream.SAMPLE)
    assert node.random() == np.random.default_rng([42, 3, 8, 3]).random()
    assert server.random() == np.random.default_rng([42, 3, 0, 1]).random()


def test_two_generators_of_one_name_do_not_share_their_state() -> None:
    first, second = (torch_generator(1, 2, 3, Stream.TRAIN) for _ in range(2))
    torch.rand(10, generator=first)
    fresh = torch_generator(1, 2, 3, Stream.TRAIN)
    assert torch.equal(torch.rand(3, generator=second), torch.rand(3, generator=fresh))


def test_torch_generator_is_on_the_cpu() -> None:
    assert torch_generator(1, 2, 3, Stream.TRAIN).device.type == "cpu"


def global_states() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_global_generators_are_neither_seeded_nor_read() -> None:
    before = global_states()
    first = numpy_draws(NAMES[5]), torch_draws(NAMES[5])
    assert global_states() == before
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert (numpy_draws(NAMES[5]), torch_draws(NAMES[5])) == first


def test_uniform_draws_look_uniform_across_nodes() -> None:
    """The first number of each node: no drift with the partition id."""
    first = np.array([numpy_generator(42, 1, i, Stream.QUERY).random() for i in range(2_000)])
    assert first.mean() == pytest.approx(0.5, abs=5 * 0.2887 / 2_000**0.5)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / 2_000**0.5
