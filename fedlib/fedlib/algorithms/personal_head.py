"""A personal last layer: the body of the model is shared, and each node keeps a head of its own.

Source: Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv:1912.00818,
algorithms 1 and 2 (FedPer). The head never travels. It lies in the node's ``Context.state``, so a
node that is replaced by a new one has lost it.

A node that has not trained yet takes the head of the initial model, which it draws itself from the
run's seed, as the server draws its own.
"""

import math
from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import nn

from fedlib import messages
from fedlib.algorithms.common import initial_model
from fedlib.algorithms.local_training import prepare
from fedlib.client_app import Node, load_model
from fedlib.data import Dataset, open_dataset
from fedlib.errors import ReplyError
from fedlib.messages import EvaluateReply, EvaluateRequest, TrainReply, TrainRequest
from fedlib.model import State, check_state, clone_state
from fedlib.training import evaluate, pick_device, single_thread

LAST_LAYER = "fc2"  # of fedlib's CNN: 128 features in, one number for each class out
HEAD = "head"  # where a node's state holds it


def split_model(state: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return body and head: the last layer's weight and bias are the head.

    Raises:
        ReplyError: The model has no layer of that name.
    """
    body = {name: t for name, t in state.items() if not _is_head(name)}
    head = {name: t for name, t in state.items() if _is_head(name)}
    if not head or not body:
        raise ReplyError(f"model: expected a last layer {LAST_LAYER} and others, got {list(state)}")
    return body, head


def handle_train_personal(message: Message, node: Node) -> RecordDict:
    """Train the global body with the node's own head; keep the head and send the body back."""
    request = messages.decode(TrainRequest, message.content)
    dataset = open_dataset(request.dataset)
    model = own_model(dataset, request.model, node)
    training = prepare(request, node, model)
    loss = training.start()
    body, head = split_model(clone_state(model))
    check_state({**body, **head}, model.state_dict())
    if not math.isfinite(loss.sum):  # then the server refuses the reply, and no head is kept
        raise ReplyError("training: expected a finite loss, got none; lower the learning rate")
    node.state[HEAD] = messages.encode_model(head)
    reply = TrainReply(body, training.num_examples, loss.sum, loss.weight)
    return messages.encode(reply)


def handle_evaluate_personal(message: Message, node: Node) -> RecordDict:
    """Evaluate the global body with the node's own head, on its own validation split."""
    request = messages.decode(EvaluateRequest, message.content)
    dataset = open_dataset(request.dataset)
    return _evaluated(own_model(dataset, request.model, node), dataset, node)


def handle_evaluate_tuned(message: Message, node: Node) -> RecordDict:
    """Train only the head of a copy of the global model, then evaluate; keep nothing.

    The simplest rival of a head that is kept: as many epochs as in TRAIN, at the learning rate of
    the message, with the body as it came.
    """
    request = messages.decode(TrainRequest, message.content)
    dataset = open_dataset(request.dataset)
    model = load_model(dataset, request.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_head(name))
    prepare(request, node, model).start()
    return _evaluated(model, dataset, node)


def own_model(dataset: Dataset, body: State, node: Node) -> nn.Module:
    """Return the model of a node: this body, and the head in its state, else the initial one."""
    head = split_model(initial_model(dataset, node.config.seed))[1]
    record: Any = node.state.get(HEAD)
    if record:
        head = dict(record.to_torch_state_dict())
    if mixed := sorted(set(body) & set(head)):
        raise ReplyError(f"model state: expected a body without {mixed}, got a whole model")
    return load_model(dataset, {**body, **head})


def _is_head(name: str) -> bool:
    return name.partition(".")[0] == LAST_LAYER


def _evaluated(model: nn.Module, dataset: Dataset, node: Node) -> RecordDict:
    device = pick_device()
    with single_thread():
        found = evaluate(model, node.load(dataset, device).validation, device)
    num_examples, num_correct = found.loss.weight, int(found.correct.sum)
    return messages.encode(EvaluateReply(num_examples, found.loss.sum, num_correct))
