"""What more than one of the other algorithms needs: the first model, vectors, refused replies."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlib.data import Dataset
from fedlib.errors import ConfigError, ReplyError
from fedlib.model import State, clone_state, make_model
from fedlib.nodes import REASON_LENGTH, Nodes
from fedlib.randomness import SERVER, Stream, torch_generator
from fedlib.run_directory import Stage


def initial_model(dataset: Dataset, seed: int) -> dict[str, Tensor]:
    """Return the model that every run with this seed begins with."""
    return clone_state(make_model(dataset, torch_generator(seed, 0, SERVER, Stream.MODEL)))


def flatten(state: State) -> NDArray[np.float64]:
    """Return all values of a state, (P,), in the alphabetical order of the names.

    Raises:
        ConfigError: A tensor is not of real numbers with a point.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"model: {name}: expected floats, got {tensor.dtype}")
    return np.concatenate([state[n].detach().cpu().double().numpy().ravel() for n in sorted(state)])


def sizes(state: State) -> list[int]:
    """Return how many values each tensor has, in the order of ``flatten``."""
    return [state[name].numel() for name in sorted(state)]


def moved(state: State, update: NDArray[np.floating]) -> dict[str, Tensor]:
    """Return the state plus an update (P,), in the state's dtypes and order."""
    parts = np.split(flatten(state) + update, np.cumsum(sizes(state))[:-1])
    new = dict(zip(sorted(state), parts, strict=True))
    return {n: torch.from_numpy(new[n]).reshape(t.shape).to(t.dtype) for n, t in state.items()}


def refuse(nodes: Nodes, stage: Stage, node_id: int, reason: ReplyError | str) -> None:
    """Count a reply that ``Nodes.ask`` has yielded as one that cannot be used, and say why."""
    stage.num_received -= 1
    stage.num_errors += 1
    stage.problems.append(f"{nodes.name(node_id)}: {reason}"[:REASON_LENGTH])
