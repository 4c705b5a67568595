"""FedAvg, one reply at a time: the memory of one model, however many nodes answer.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", arXiv:1602.05629, algorithm 1: the new global model is the mean of the clients' models,
weighted by their numbers of examples.

Replies arrive in another order in every run, and floating-point addition depends on the order.
So the sum is kept in two float64 tensors, the second holding what rounding cut off the first
(Knuth's two-sum, TAOCP vol. 2, 4.2.2). The order then changes the sum by about one part in
2^100 of the largest term, so in practice the float32 model that comes out is the same, bit for bit.
"""

import torch
from torch import Tensor

from fedlib.errors import ReplyError
from fedlib.model import State, check_state


class FedAvg:
    """The running mean of the clients' models, weighted by their numbers of examples.

    Args:
        reference: The global model's state: every reply must have its names, shapes and dtypes.
    """

    def __init__(self, reference: State) -> None:
        self._reference = reference
        self._sum = {k: torch.zeros_like(v, dtype=_wide(v)) for k, v in reference.items()}
        self._rest = {k: torch.zeros_like(s) for k, s in self._sum.items() if s.is_floating_point()}
        self.num_states = 0
        self.num_examples = 0

    def add(self, state: State, num_examples: int) -> None:
        """Add one client's model; a state that is refused changes nothing.

        Args:
            state: The client's parameters and buffers by name.
            num_examples: Its weight: the number of examples that it trained on, at least 1.

        Raises:
            ReplyError: Names, shapes or dtypes differ from the global model's, a value is not
                finite, or ``num_examples`` is not positive.
        """
        if num_examples < 1:
            raise ReplyError(f"num_examples: expected at least 1, got {num_examples}")
        check_state(state, self._reference)
        for name, tensor in state.items():
            total, term = self._sum[name], tensor.to(_wide(tensor)) * num_examples
            if not tensor.is_floating_point():
                total += term  # integers add exactly
                continue
            new_total = total + term
            carried = new_total - total
            self._rest[name] += (total - (new_total - carried)) + (term - carried)
            self._sum[name] = new_total
        self.num_states += 1
        self.num_examples += num_examples

    def result(self) -> dict[str, Tensor]:
        """Return the mean in the reference's dtypes; without any reply, a copy of the reference.

        Integer buffers (a BatchNorm layer's batch counter, say) take the weighted mean rounded
        to the nearest integer, booleans the weighted majority.
        """
        if not self.num_states:
            return {name: tensor.clone() for name, tensor in self._reference.items()}
        mean = {}
        for name, total in self._sum.items():
            exact = (total + self._rest[name]) if name in self._rest else total.double()
            ratio = exact / float(self.num_examples)
            dtype = self._reference[name].dtype
            mean[name] = (ratio if dtype.is_floating_point else ratio.round()).to(dtype)
        return mean


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_floating_point() else torch.int64
