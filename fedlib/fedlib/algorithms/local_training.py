"""The node's step of every algorithm here: FedAvg's training, perhaps with other gradients.

``fedlib.train`` stays as it is. PyTorch lets anybody change a parameter's gradient on its way from
``backward`` to the optimizer, and that is all that FedProx and SCAFFOLD ask for.

Source: https://docs.pytorch.org/docs/stable/generated/torch.Tensor.register_hook.html
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from fedlib.client_app import Node, load_model, train_as_told
from fedlib.data import open_dataset
from fedlib.messages import TrainRequest
from fedlib.training import Weighted, pick_device

Correction = Callable[[str, Tensor, Tensor], Tensor]
"""From a parameter's name, its value and its gradient: the gradient that SGD shall see."""


@contextmanager
def corrected_gradients(model: nn.Module, correct: Correction) -> Iterator[None]:
    """Correct every gradient that is computed inside the block, and none after it.

    Of each parameter ``correct`` gets the name, the value without a graph, and the gradient. It
    returns a gradient of the same shape on the same device, and changes none of them.
    """

    def corrected(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        return correct(name, parameter.detach(), gradient)

    hooks = [
        parameter.register_hook(partial(corrected, name, parameter))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class LocalTraining:
    """What a node does on TRAIN, ready to be started: with the same seeds, the same as fedlib's."""

    model: nn.Module  # the global model, on the device on which it will be trained
    num_examples: int
    num_steps: int  # of SGD: one a batch, in every epoch
    start: Callable[[], Weighted]  # trains the model, and returns the loss (nats)


def prepare(request: TrainRequest, node: Node, model: nn.Module | None = None) -> LocalTraining:
    """Load the node's data and the request's model, unless another model is given.

    See ``fedlib.client_app.handle_train``. A parameter that asks for no gradient stays as it is.

    Raises:
        FedlibError: The data set cannot be opened, or the model is not of its kind.
    """
    config, dataset, device = node.config, open_dataset(request.dataset), pick_device()
    split = node.load(dataset, device).train
    model = (model or load_model(dataset, request.model)).to(device)

    start = partial(train_as_told, request, node, model, split, device)
    num_steps = config.local_epochs * math.ceil(len(split) / config.batch_size)
    return LocalTraining(model, len(split), num_steps, start)
