"""Where every random number comes from: ``(seed, server_round, partition_id)``.

Nothing in fedlib seeds or reads a global generator. Each place that needs chance asks for a
generator of its own, named by what it is for. So the order in which nodes run, the engine that
runs them and the number of processes change nothing.
"""

from enum import IntEnum

import numpy as np
import torch

SERVER = -1  # the partition id under which the server draws: it holds no partition


class Stream(IntEnum):
    """What a generator is for: two streams of one node and round share nothing."""

    MODEL = 0
    SAMPLE = 1
    TRAIN = 2
    QUERY = 3


def numpy_generator(
    seed: int, server_round: int, partition_id: int, stream: int
) -> np.random.Generator:
    """Return NumPy's generator for one purpose, of one node, in one round (0: before round 1)."""
    return np.random.default_rng(_sequence(seed, server_round, partition_id, stream))


def torch_generator(
    seed: int, server_round: int, partition_id: int, stream: int
) -> torch.Generator:
    """Return PyTorch's CPU generator for one purpose, of one node, in one round."""
    state = _sequence(seed, server_round, partition_id, stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))  # which takes 63 bits


def _sequence(
    seed: int, server_round: int, partition_id: int, stream: int
) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, server_round, partition_id + 1, int(stream)])  # all >= 0
