"""FedAvg, one reply at a time: the memory of one model, however many nodes answer.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", arXiv:1602.05629, algorithm 1: the new global model is the mean of the clients' models,
weighted by their numbers of examples.

Replies arrive in another order in every run, and floating-point addition depends on the order.
So the sum is kept in two float64 tensors, the second holding what rounding cut off the first
(Knuth's two-sum, TAOCP vol. 2, 4.2.2). The order then changes the sum by about one part in
2^100 of the largest term, so in practice the float32 model that comes out is the same, bit for bit.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.config import Config
from fedlib.errors import ReplyError
from fedlib.model import State, check_state


class FedAvg:
    """The running mean of the clients' models, weighted by their numbers of examples.

    Every model must have the names, shapes and dtypes of the reference, the global model's state.
    """

    def __init__(self, reference: State) -> None:
        self._reference = reference
        self._sum: dict[str, Any] = dict.fromkeys(reference, 0)
        self._rest: dict[str, Any] = dict.fromkeys(reference, 0)
        self.num_states = 0
        self.num_examples = 0

    def add(self, state: State, num_examples: int) -> None:
        """Add one client's model with its weight; a state that is refused changes nothing.

        Raises:
            ReplyError: Names, shapes or dtypes differ from the global model's, a value is not
                finite, or ``num_examples`` is not positive.
        """
        if num_examples < 1:
            raise ReplyError(f"num_examples: expected at least 1, got {num_examples}")
        check_state(state, self._reference)
        for name, tensor in state.items():
            total, term = self._sum[name], _wide(tensor) * num_examples
            new_total = total + term
            carried = new_total - total
            self._rest[name] += (total - (new_total - carried)) + (term - carried)  # 0 of integers
            self._sum[name] = new_total
        self.num_states += 1
        self.num_examples += num_examples

    def result(self) -> dict[str, Tensor]:
        """Return the mean in the reference's dtypes; without any reply, a copy of the reference.

        Integer buffers (a BatchNorm layer's batch counter, say) take the exact weighted mean,
        rounded to the nearest integer, booleans the weighted majority.
        """
        if not self.num_states:
            return {name: tensor.clone() for name, tensor in self._reference.items()}
        mean = {}
        for name, wanted in self._reference.items():
            total = self._sum[name] + self._rest[name]
            if isinstance(total, Tensor):
                ratio = total / float(self.num_examples)
                ratio = torch.view_as_complex(ratio) if wanted.is_complex() else ratio
            else:
                sums = np.array(total, dtype=object).ravel()
                means = [round(Fraction(number, self.num_examples)) for number in sums]
                ratio = torch.tensor(means, dtype=wanted.dtype).reshape(wanted.shape)
            mean[name] = ratio.to(wanted.dtype)
        return mean


def server_step(config: Config, model: State, mean: State, memory: State) -> tuple[State, State]:
    """Make the next global model out of the mean of the nodes' models: the seam of the round.

    FedAvg takes the mean as it is and remembers nothing. A server with momentum, say, remembers its
    velocity. (Reddi et al., arXiv:2003.00295, algorithm 1, call this step ServerOpt.)

    Args:
        config: The run's config, with settings of your own.
        model: The global model that the nodes started from.
        mean: The mean of what they made of it.
        memory: What this function remembered in the last round; nothing before the first.

    Returns:
        The next global model, and what to remember: tensors by name, saved in ``latest.pt``, so
        that a run that was stopped goes on as if it had not been.
    """
    return mean, {}


def _wide(tensor: Tensor) -> Any:
    """Return the values in a form to sum them in: float64, or Python's own unbounded integers."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).double()
    return tensor.double() if tensor.is_floating_point() else tensor.numpy().astype(object)
