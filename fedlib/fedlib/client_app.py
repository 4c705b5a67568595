"""The ClientApp: a thin shell that decodes a message, calls the core, and encodes the reply."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedlib import messages
from fedlib.config import Config
from fedlib.data import Dataset, Partition, Split, load_partition, open_dataset
from fedlib.errors import DataError, FedlibError, TooLateError, describe
from fedlib.model import State, check_state, make_model
from fedlib.randomness import Stream, numpy_generator, torch_generator
from fedlib.training import Weighted, evaluate, pick_device, single_thread, train

OPT_IN_PROBABILITY = 0.5
REFUSED = 100  # code of the Error that carries a line of ours (Flower's own end below 100)
TRACE = "FEDLIB_TRACE"  # names a file to which every answered message adds when it was what


@dataclass(frozen=True)
class Node:
    """What a node knows of itself."""

    config: Config
    partition_id: int
    num_partitions: int
    state: RecordDict  # what it keeps from one message to the next: Flower's Context.state

    def load(self, dataset: Dataset, device: str) -> Partition:
        """Return the node's own part of a data set, on the device that it computes on."""
        alpha, seed = self.config.dirichlet_alpha, self.config.seed
        return load_partition(dataset, self.num_partitions, alpha, seed, self.partition_id, device)


Handler = Callable[[Message, Node], RecordDict]


def make_client_app(config: Config | None = None) -> ClientApp:
    """Return the ClientApp.

    Without a config, it is read from ``context.run_config``, which ``flwr run`` fills and
    ``simulate`` leaves empty.
    """
    app = ClientApp()
    handlers = (
        (app.train(), handle_train),
        (app.evaluate(), handle_evaluate),
        (app.query(), handle_query),
        (app.query(messages.IDENTIFY_ACTION), handle_identify),
    )
    for register, handler in handlers:
        register(partial(answer, handler, config=config))
    return app


def answer(handler: Handler, message: Message, context: Context, config: Config | None) -> Message:
    """Call a handler; whatever it raises goes back to the server as one line."""
    began, startup_s = time.time(), time.process_time()
    try:
        if seconds_left(message) <= 0:
            raise TooLateError("the message had expired when its turn came")
        node = _node(config or Config.from_run_config(context.run_config), context)
        content = handler(message, node)
        _trace(message, node, began, startup_s)
        return Message(content, reply_to=message)
    except TooLateError as error:
        # A ClientApp cannot but reply; this reply expires at once, and Flower drops it.
        reply = Message(Error(REFUSED, str(error)), reply_to=message)
        reply.metadata.ttl = min(reply.metadata.ttl, 1e-6)
        while seconds_left(reply) >= 0:  # a clock moves in steps, on Windows of 16 ms
            time.sleep(0.001)
        return reply
    except FedlibError as error:
        return Message(Error(REFUSED, str(error)), reply_to=message)
    except Exception as error:
        return Message(Error(REFUSED, describe(error)), reply_to=message)


def handle_train(message: Message, node: Node) -> RecordDict:
    """Train the global model on the node's own data; reply with model, weight and loss."""
    request = messages.decode(messages.TrainRequest, message.content)
    dataset, device = open_dataset(request.dataset), pick_device()
    partition, model = node.load(dataset, device), load_model(dataset, request.model)
    loss = train_as_told(request, node, model, partition.train, device)
    reply = messages.TrainReply(model.state_dict(), len(partition.train), loss.sum, loss.weight)
    return messages.encode(reply)


def train_as_told(
    request: messages.TrainRequest, node: Node, model: nn.Module, split: Split, device: str
) -> Weighted:
    """Train a model in place, with the node's settings and its chance in this round."""
    config, who = node.config, (node.config.seed, request.server_round, node.partition_id)
    with single_thread():
        return train(
            model,
            split,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=request.learning_rate,
            momentum=config.momentum,
            generator=torch_generator(*who, Stream.TRAIN),
            augmentation=config.augmentation,
            device=device,
        )


def handle_evaluate(message: Message, node: Node) -> RecordDict:
    """Evaluate the global model on the node's own validation split."""
    request = messages.decode(messages.EvaluateRequest, message.content)
    dataset, device = open_dataset(request.dataset), pick_device()
    partition, model = node.load(dataset, device), load_model(dataset, request.model)
    with single_thread():
        found = evaluate(model, partition.validation, device)
    num_examples, num_correct = found.loss.weight, int(found.correct.sum)
    return messages.encode(messages.EvaluateReply(num_examples, found.loss.sum, num_correct))


def handle_query(message: Message, node: Node) -> RecordDict:
    """Say whether the node takes part in the evaluation, after a random time to think.

    The time counts from the moment at which the message was sent, not from when its turn came,
    so nodes that share an actor wait side by side, not one behind the other. A node that would
    answer after the message expires does not wait at all: nobody would get the answer, and the
    next message would be held up.

    Raises:
        TooLateError: The node cannot answer before the message expires.
    """
    request, config = messages.decode(messages.QueryRequest, message.content), node.config
    rng = numpy_generator(config.seed, request.server_round, node.partition_id, Stream.QUERY)
    opt_in = bool(rng.random() < OPT_IN_PROBABILITY)
    delay_s = rng.random() * config.query_max_delay
    if delay_s >= message.metadata.ttl:
        raise TooLateError(f"the answer would take {delay_s:.1f} s")
    time.sleep(max(0.0, message.metadata.created_at + delay_s - time.time()))
    return messages.encode(messages.QueryReply(opt_in))


def handle_identify(message: Message, node: Node) -> RecordDict:
    """Tell the server which partition this node holds."""
    return messages.encode(messages.Identity(node.partition_id, node.num_partitions))


def load_model(dataset: Dataset, state: State) -> nn.Module:
    """Return a model with this state.

    Raises:
        ReplyError: It is not a state of the model that this node has for the data set.
    """
    model = make_model(dataset, torch.Generator())
    check_state(state, model.state_dict())
    model.load_state_dict(state)
    return model


def seconds_left(message: Message) -> float:
    """Return the seconds until a message expires; below zero, nobody awaits the reply.

    The sender's clock made the time stamp: between machines, their clocks must agree.
    """
    return message.metadata.created_at + message.metadata.ttl - time.time()


def _trace(message: Message, node: Node, began: float, startup_s: float) -> None:
    """Note when what happened (seconds since the epoch), if somebody asked for that."""
    if path := os.environ.get(TRACE):
        metadata, now = message.metadata, time.time()
        moments = {"sent": metadata.created_at, "began": began, "ended": now}
        who = {"partition_id": node.partition_id, "process": os.getpid()}
        cost = {"startup_cpu_s": startup_s}  # what this process had computed before
        line = json.dumps({"message_type": metadata.message_type, **who, **cost, **moments})
        with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")  # one short write: lines do not mix


def _node(config: Config, context: Context) -> Node:
    wanted = ("partition-id", "num-partitions")
    partition_id, num_partitions = (context.node_config.get(key) for key in wanted)
    if type(partition_id) is not int or type(num_partitions) is not int:
        raise DataError(
            f"expected a node config with {' and '.join(wanted)}, got {dict(context.node_config)}; "
            f'start the SuperNode with --node-config "partition-id=0 num-partitions=50"'
        )
    return Node(config, partition_id, num_partitions, context.state)


app = make_client_app()
