"""The ClientApp: a thin shell that decodes a message, calls the core, and encodes the reply.

In a deployment, each message is answered by a process of its own. Whoever answers a QUERY must
not pay for PyTorch (two seconds of import): what needs it is imported where it is used.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlib import messages
from fedlib.config import Config
from fedlib.errors import DataError, FedlibError, TooLateError
from fedlib.randomness import Stream, numpy_generator, torch_generator

if TYPE_CHECKING:
    from fedlib.data import Partition
    from fedlib.model import CNN, State

OPT_IN_PROBABILITY = 0.5
REFUSED = 100
"""Code of the ``Error`` that carries a ``FedlibError``'s text (Flower's own end below 100)."""
EXPIRED_TTL_S = 1e-6
"""Time-to-live of a reply that must not arrive."""
TRACE = "FEDLIB_TRACE"
"""Environment variable: a file to which every answered message adds when it was what."""


@dataclass(frozen=True)
class Node:
    """What a node knows of itself: its config, and which of how many partitions it holds."""

    config: Config
    identity: messages.Identity

    @property
    def partition_id(self) -> int:
        """Which partition the node holds, from 0."""
        return self.identity.partition_id

    def load(self, dataset: str, device: str) -> "Partition":
        """Return the node's own part of a data set, on the device that it computes on."""
        from fedlib.data import load_partition, open_dataset

        return load_partition(
            open_dataset(dataset),
            self.identity.num_partitions,
            self.config.dirichlet_alpha,
            self.config.seed,
            self.partition_id,
            device,
        )


Handler = Callable[[Message, Node], RecordDict]


def make_client_app(config: Config | None = None) -> ClientApp:
    """Return the ClientApp.

    Args:
        config: The run's config; without one, it is read from ``context.run_config``, which
            ``flwr run`` fills and ``run_simulation`` leaves empty.
    """
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return answer(handle_train, message, context, config)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        return answer(handle_evaluate, message, context, config)

    @app.query()
    def _query(message: Message, context: Context) -> Message:
        return answer(handle_query, message, context, config)

    @app.query(messages.IDENTIFY_ACTION)
    def _identify(message: Message, context: Context) -> Message:
        return answer(handle_identify, message, context, config)

    return app


def answer(handler: Handler, message: Message, context: Context, config: Config | None) -> Message:
    """Call a handler; what a person can put right goes back as one line, not as a traceback."""
    began, startup_s = time.time(), time.process_time()
    try:
        if seconds_left(message) <= 0:
            raise TooLateError("the message had expired when its turn came")
        config = config or Config.from_run_config(context.run_config)
        node = Node(config, _identity(context))
        content = handler(message, node)
        _trace(message, node, began, startup_s)
        return Message(content, reply_to=message)
    except TooLateError as error:
        # A ClientApp cannot but reply; this reply has expired too, and Flower drops it.
        ttl = EXPIRED_TTL_S if seconds_left(message) > EXPIRED_TTL_S else None
        reply = Message(Error(REFUSED, str(error)), reply_to=message, ttl=ttl)
        while seconds_left(reply) >= 0:  # a clock moves in steps, on Windows of 16 ms
            time.sleep(0.001)
        return reply
    except FedlibError as error:
        return Message(Error(REFUSED, str(error)), reply_to=message)


def handle_train(message: Message, node: Node) -> RecordDict:
    """Train the global model on the node's own data; reply with weights, weight and loss."""
    from fedlib.training import pick_device, single_thread, train

    request, device = messages.decode_train_request(message.content), pick_device()
    config, partition = node.config, node.load(request.dataset, device)
    model = _load_model(request.model)
    with single_thread():
        loss = train(
            model,
            partition.train,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=request.learning_rate,
            momentum=config.momentum,
            generator=torch_generator(
                config.seed, request.server_round, node.partition_id, Stream.TRAIN
            ),
            device=device,
        )
    reply = messages.TrainReply(model.state_dict(), len(partition.train), loss)
    return messages.encode_train_reply(reply)


def handle_evaluate(message: Message, node: Node) -> RecordDict:
    """Evaluate the global model on the node's own validation split."""
    from fedlib.training import evaluate, pick_device, single_thread

    request, device = messages.decode_evaluate_request(message.content), pick_device()
    partition = node.load(request.dataset, device)
    with single_thread():
        evaluation = evaluate(_load_model(request.model), partition.validation, device)
    return messages.encode_evaluate_reply(evaluation)


def handle_query(message: Message, node: Node) -> RecordDict:
    """Say, some random time after the message was sent, whether the node takes part.

    The time stands for whatever keeps a real device busy. It counts from the moment of sending,
    so nodes that share an actor wait side by side, not one behind the other. A node that would
    answer after the message expires does not wait at all: nobody would get the answer, and the
    next message would be held up.

    Raises:
        TooLateError: The node cannot answer before the message expires.
    """
    server_round = messages.decode_query_request(message.content)
    config = node.config
    rng = numpy_generator(config.seed, server_round, node.partition_id, Stream.QUERY)
    opt_in = bool(rng.random() < OPT_IN_PROBABILITY)
    delay_s = rng.random() * config.query_max_delay
    if delay_s >= message.metadata.ttl:
        raise TooLateError(f"the answer would take {delay_s:.1f} s")
    time.sleep(max(0.0, message.metadata.created_at + delay_s - time.time()))
    return messages.encode_query_reply(opt_in)


def handle_identify(message: Message, node: Node) -> RecordDict:
    """Tell the server which partition this node holds."""
    return messages.encode_identity(node.identity)


def seconds_left(message: Message) -> float:
    """Return the seconds until a message expires; below zero, nobody awaits the reply.

    The sender's clock made the time stamp: between machines, their clocks must agree.
    """
    return message.metadata.created_at + message.metadata.ttl - time.time()


def _trace(message: Message, node: Node, began: float, startup_s: float) -> None:
    """Note when what happened (seconds since the epoch), if somebody asked for that."""
    if path := os.environ.get(TRACE):
        moments = {
            "message_type": message.metadata.message_type,
            "partition_id": node.partition_id,
            "process": os.getpid(),
            "sent": message.metadata.created_at,
            "startup_cpu_s": startup_s,  # what this process had computed before
            "began": began,
            "ended": time.time(),
        }
        with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(moments) + "\n")  # one short write: lines do not mix


def _identity(context: Context) -> messages.Identity:
    wanted = ("partition-id", "num-partitions")
    partition_id, num_partitions = (context.node_config.get(key) for key in wanted)
    if type(partition_id) is not int or type(num_partitions) is not int:
        raise DataError(
            f"expected a node config with {' and '.join(wanted)}, "
            f"got {dict(context.node_config)}; start the SuperNode with "
            f'--node-config "partition-id=0 num-partitions=50"'
        )
    return messages.Identity(partition_id, num_partitions)


def _load_model(state: "State") -> "CNN":
    import torch

    from fedlib.model import CNN, check_state

    model = CNN(torch.Generator())
    check_state(state, model.state_dict())
    model.load_state_dict(state)
    return model


app = make_client_app()
