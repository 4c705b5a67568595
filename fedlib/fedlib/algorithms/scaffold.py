"""SCAFFOLD: an ArrayRecord more each way, and a node that remembers.

A node's control variate is its gradient as it was when the node last trained; the server's is their
mean over all nodes. A node takes its own out of each gradient and puts the server's in, and so
walks where all nodes would, not where it alone would. A node keeps its new control variate before
its reply has arrived: if that is lost or refused, the server's is no longer the mean.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv:1910.06378, algorithm 1 with option II and a global step of 1. There every node counts once.
Here a node may weigh as much as it has examples, in both means alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import Tensor, nn

from fedlib.aggregation import FedAvg
from fedlib.algorithms.local_training import corrected_gradients, prepare
from fedlib.algorithms.messages import OWN_CONTROL, ScaffoldReply, ScaffoldRequest
from fedlib.client_app import Node
from fedlib.errors import ConfigError, ReplyError
from fedlib.messages import decode, encode, encode_model
from fedlib.model import State, check_state, clone_state

LocalRound = Callable[[nn.Module, Callable[[], Any], State, State, int, float], State]
"""What ``local_round`` is: the place for a function of your own."""


def zero_control(model: nn.Module) -> dict[str, Tensor]:
    """Return a control variate of zeros, one for each parameter: the first of all."""
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def local_round(
    model: nn.Module,
    train: Callable[[], Any],
    control: State,
    own_control: State,
    num_steps: int,
    learning_rate: float,
) -> State:
    """Train with corrected gradients, and return the node's next control variate.

    Args:
        model: The global model, which ``train()`` trains in place by plain SGD.
        train: Takes ``num_steps`` steps with the learning rate below.
        control: The server's control variate, a tensor for each parameter.
        own_control: The node's own, likewise.
        num_steps: K in the paper.
        learning_rate: The node's, eta_l in the paper.

    Source: lines 10 and 12 (option II) of algorithm 1.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def correct(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient - own_control[name] + control[name]

    with corrected_gradients(model, correct):
        train()
    return {
        name: own_control[name]
        - control[name]
        + (before[name] - p.detach()) / (num_steps * learning_rate)
        for name, p in model.named_parameters()
    }


def handle_scaffold(
    message: Message, node: Node, local_round: LocalRound = local_round
) -> RecordDict:
    """Train with corrected gradients, keep the new control variate, and reply with its change.

    Raises:
        ConfigError: The nodes' SGD has momentum: then a change of the model is no mean of
            gradients.
        ReplyError: The control variate is not of the model's kind, or the training diverged; then
            the node's own stays as it was.
    """
    request, momentum = decode(ScaffoldRequest, message.content), node.config.momentum
    if momentum:
        raise ConfigError(
            f"run config: momentum: expected 0 with SCAFFOLD, whose control variates are means of "
            f"plain gradients, got {momentum:g}; set momentum=0"
        )
    training = prepare(request, node)
    model = training.model
    zeros = zero_control(model)
    check_control(request.control, zeros)
    device = next(model.parameters()).device
    control = {name: tensor.to(device) for name, tensor in request.control.items()}
    own = load_own_control(node.state, zeros)
    losses = list[Any]()

    def train() -> None:
        losses.append(training.start())

    new = local_round(model, train, control, own, training.num_steps, request.learning_rate)
    check_state(clone_state(model), request.model)
    check_control(new, zeros)  # one that diverged is not kept
    node.state[OWN_CONTROL] = encode_model(new)
    change = {name: new[name] - own[name] for name in own}
    n, loss = training.num_examples, losses[-1]
    return encode(ScaffoldReply(model.state_dict(), n, loss.sum, loss.weight, change))


def load_own_control(state: RecordDict, zeros: State) -> dict[str, Tensor]:
    """Return the control variate that a node keeps in its state; zeros, if it never trained."""
    kept: Any = state.get(OWN_CONTROL)
    if kept is None:
        return dict(zeros)
    return {k: tensor.to(zeros[k].device) for k, tensor in kept.to_torch_state_dict().items()}


def check_control(control: State, reference: State) -> None:
    """Check that a control variate has the names, shapes and dtypes of the reference.

    Raises:
        ReplyError: It has not, or a value is not finite.
    """
    try:
        check_state(control, reference)
    except ReplyError as error:
        raise ReplyError(str(error).replace("model state", "control variate")) from error


class ScaffoldMean:
    """The server's two means, of the models and of the changes of control, weighted alike."""

    def __init__(self, model: State, control: State) -> None:
        self._models, self._changes, self._control = FedAvg(model), FedAvg(control), control

    def add(self, reply: ScaffoldReply, weight: int) -> None:
        """Add one reply; one that is refused changes nothing.

        Raises:
            ReplyError: The model or the change of control is not of the global one's kind.
        """
        check_control(reply.control, self._control)
        self._models.add(reply.model, weight)
        self._changes.add(reply.control, weight)

    def result(self, total_weight: int) -> tuple[State, State]:
        """Return the next model and the next control variate (lines 16 and 17 of algorithm 1).

        Args:
            total_weight: The weights of all nodes, those included that did not train. Where every
                node counts once, this is their number.
        """
        if not self._models.num_states:
            return self._models.result(), dict(self._control)
        share = min(1.0, self._models.num_examples / total_weight)  # a node may boast
        change = self._changes.result()
        control = {name: tensor + share * change[name] for name, tensor in self._control.items()}
        try:
            check_control(control, self._control)
        except ReplyError:  # a sum too large for float32: no node would take it
            control = dict(self._control)
        return self._models.result(), control
