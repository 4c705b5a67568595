"""FedProx: one number more in the message, and one term more in the node's gradient.

A node minimises its own loss plus a penalty, ``mu / 2 * |w - w0|^2``, where ``w0`` is the global
model that it was sent. The penalty's gradient is ``mu * (w - w0)``, so it needs no second pass. The
server's line is FedAvg's.

Source: Li et al., "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127, algorithm
2. (There a node may also stop early; here each trains for all of its epochs.)
"""

from flwr.app import Message, RecordDict
from torch import Tensor

from fedlib.algorithms.local_training import Correction, corrected_gradients, prepare
from fedlib.algorithms.messages import ProximalRequest
from fedlib.client_app import Node
from fedlib.messages import TrainReply, decode, encode
from fedlib.model import State


def pull_back(to: State, mu: float) -> Correction:
    """Return the correction that adds the gradient of ``mu / 2 * |w - to|^2``.

    Args:
        to: The global model's parameters by name, on the device of the training.
        mu: Strength of the pull, 0 or more; with 0, gradients keep their values.
    """

    def correct(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient + mu * (parameter - to[name])

    return correct


def handle_proximal(message: Message, node: Node) -> RecordDict:
    """Train as on TRAIN, pulled back to the global model; reply as to TRAIN."""
    request = decode(ProximalRequest, message.content)
    training = prepare(request, node)
    start = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    with corrected_gradients(training.model, pull_back(start, request.proximal_mu)):
        loss = training.start()
    state = training.model.state_dict()
    return encode(TrainReply(state, training.num_examples, loss.sum, loss.weight))
