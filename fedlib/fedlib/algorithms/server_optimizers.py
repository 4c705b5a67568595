"""The server as an optimizer: the change from model to mean is its gradient, with the other sign.

Each function here makes a ``ServerStep`` for ``fedlib.run``. Messages and nodes are FedAvg's.
What a step remembers is a flat dictionary of tensors, such as ``momentum/fc1.weight``, so that
``latest.pt`` can hold it.

Equal to ``FedAvgM`` and ``FedAdam`` of ``flwr.serverapp.strategy`` in Flower 1.42, up to rounding.
"""

import torch

from fedlib.config import Config
from fedlib.model import State
from fedlib.server_app import ServerStep

MOMENTUM, VARIANCE, NUM_STEPS = "momentum", "variance", "num-steps"


def fedavgm(momentum: float = 0.9, learning_rate: float = 1.0) -> ServerStep:
    """Return FedAvgM's step: a velocity of the changes, which starts at zero.

    With ``momentum`` 0 and ``learning_rate`` 1, this is FedAvg, up to rounding.

    Source: Hsu et al., arXiv:1909.06335, section 4.3; the learning rate is Flower's.
    """

    def step(config: Config, model: State, mean: State, memory: State) -> tuple[State, State]:
        change = {name: mean[name] - model[name] for name in model}
        old = _part(memory, MOMENTUM, model)
        velocity = {name: momentum * old[name] + change[name] for name in model}
        following = {name: model[name] + learning_rate * velocity[name] for name in model}
        return _usable(model, mean, memory, following, _flat(MOMENTUM, velocity))

    return step


def fedadam(
    learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> ServerStep:
    """Return FedAdam's step: a moving mean of the changes, divided by their moving size.

    Args:
        learning_rate: The server's, ``eta`` in the paper and in Flower.
        beta_1: Share of the old in the moving mean.
        beta_2: Share of the old in the moving mean of the squares.
        tau: Added to the root of the latter: the larger, the less each weight has its own rate.

    Source: Reddi et al., arXiv:2003.00295, algorithm 2. As in Flower, and not in the paper, the
    learning rate is corrected for a start from zero (Kingma & Ba, arXiv:1412.6980, section 2), in
    round t with t + 1; and the moving mean of the squares starts at 0, not at ``tau``^2 or more.
    """

    def step(config: Config, model: State, mean: State, memory: State) -> tuple[State, State]:
        change = {name: mean[name] - model[name] for name in model}
        m, v = _part(memory, MOMENTUM, model), _part(memory, VARIANCE, model)
        m = {name: beta_1 * m[name] + (1 - beta_1) * change[name] for name in model}
        v = {name: beta_2 * v[name] + (1 - beta_2) * change[name] ** 2 for name in model}
        num_steps = int(memory.get(NUM_STEPS, torch.tensor(0))) + 1
        power = num_steps + 1
        rate = learning_rate * (1 - beta_2**power) ** 0.5 / (1 - beta_1**power)
        following = {name: model[name] + rate * m[name] / (v[name].sqrt() + tau) for name in model}
        counted = {NUM_STEPS: torch.tensor(num_steps)}
        new_memory = {**_flat(MOMENTUM, m), **_flat(VARIANCE, v), **counted}
        return _usable(model, mean, memory, following, new_memory)

    return step


def _usable(
    model: State, mean: State, memory: State, following: State, new_memory: State
) -> tuple[State, State]:
    """Return the step; where it leads to no number, what was before: one such reply is forgotten.

    Only what has a point takes a step. Of other tensors (counters, say) the mean is taken.
    """
    if not all(t.isfinite().all() for t in (*following.values(), *new_memory.values())):
        return model, memory
    floats = {name for name, tensor in model.items() if tensor.is_floating_point()}
    return {name: following[name] if name in floats else mean[name] for name in model}, new_memory


def _flat(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in state.items()}


def _part(memory: State, prefix: str, model: State) -> State:
    """Return what a memory holds for each tensor of the model; zeros before the first round."""
    if not memory:
        return {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    return {name: memory[f"{prefix}/{name}"] for name in model}
