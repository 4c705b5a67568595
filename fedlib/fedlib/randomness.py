"""Where every random number comes from: ``(seed, server_round, partition_id)``.

Nothing in fedlib seeds or reads a global generator. Each place that needs chance asks for a
generator of its own, named by what it is for. So the order in which nodes run, the engine that
runs them and the number of processes change nothing.
"""

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SERVER = -1
"""The partition id under which the server draws: it holds no partition."""


class Stream(IntEnum):
    """What a generator is for: two streams of one node and round share nothing."""

    MODEL = 0
    SAMPLE = 1
    TRAIN = 2
    QUERY = 3


def _entropy(seed: int, server_round: int, partition_id: int, stream: Stream) -> list[int]:
    return [seed, server_round, partition_id + 1, int(stream)]  # all non-negative, as NumPy asks


def numpy_generator(
    seed: int, server_round: int, partition_id: int, stream: Stream
) -> np.random.Generator:
    """Return NumPy's generator for one purpose, of one node, in one round (0: before round 1)."""
    return np.random.default_rng(_entropy(seed, server_round, partition_id, stream))


def torch_generator(
    seed: int, server_round: int, partition_id: int, stream: Stream
) -> "torch.Generator":
    """Return PyTorch's CPU generator for one purpose, of one node, in one round."""
    import torch

    sequence = np.random.SeedSequence(_entropy(seed, server_round, partition_id, stream))
    # 63 bits: manual_seed takes a signed 64-bit integer.
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
