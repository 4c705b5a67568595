"""Asynchronous learning: no rounds; each reply changes the model, and a push follows it.

The rules are plain functions of tensors: ``rule(current, sent, trained)`` returns what is current
next. ``run_async`` is the loop around them, on Flower's ``push_messages`` and ``pull_messages``.

Sources: FedAsync is Xie, Koyejo & Gupta, "Asynchronous Federated Optimization", arXiv:1903.03934,
algorithm 1 (without its proximal term on the nodes). FedBuff is Nguyen et al., "Federated Learning
with Buffered Asynchronous Aggregation", arXiv:2106.06639, algorithm 1.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedlib.config import Config
from fedlib.errors import ConfigError, ReplyError, one_line
from fedlib.messages import TRAIN, TrainReply, TrainRequest, decode, encode
from fedlib.model import State, check_state
from fedlib.nodes import REASON_LENGTH
from fedlib.randomness import SERVER, Stream, numpy_generator

REST_S = 0.1  # between two looks for replies


@dataclass(frozen=True)
class Versioned:
    """A global model, and the number of changes that made it."""

    model: State
    version: int = 0
    buffer: State = field(default_factory=dict)  # FedBuff: the sum of the changes that wait
    num_buffered: int = 0  # and how many these are


Rule = Callable[[Versioned, Versioned, State], Versioned]
"""What is current, what the node was sent and what it made of it go in; what is current comes out.

No argument is changed. The model that was trained has the names and shapes of the one sent."""


def discount(staleness: int, exponent: float = 0.5) -> float:
    """Return how much a training counts whose model has changed ``staleness`` times since.

    Source: ``(1 + staleness) ** -exponent`` is "polynomial" in arXiv:1903.03934, section 5.2; with
    one half, it is also the scaling in arXiv:2106.06639.
    """
    return float((1 + staleness) ** -exponent)


@dataclass(frozen=True)
class FedAsync:
    """Mix the model that was trained into the current one: ``x + alpha_t (x_new - x)``.

    ``alpha_t`` is ``alpha`` (above 0, at most 1) times the discount for staleness.
    """

    alpha: float = 0.6
    exponent: float = 0.5

    def __call__(self, current: Versioned, sent: Versioned, trained: State) -> Versioned:
        """Return the current model with its next version: each training makes one."""
        share = self.alpha * discount(current.version - sent.version, self.exponent)
        mixed = {k: _add(old, share, trained[k] - old) for k, old in current.model.items()}
        return Versioned(mixed, current.version + 1)


@dataclass(frozen=True)
class FedBuff:
    """Collect ``size`` changes, and add ``server_rate`` times their mean to the current model.

    A change is the model that was trained less the model *that the node was sent*, times the
    discount for staleness. The mean divides by ``size``, not by the sum of the discounts.
    """

    size: int = 5
    server_rate: float = 1.0
    exponent: float = 0.5

    def __call__(self, current: Versioned, sent: Versioned, trained: State) -> Versioned:
        """Return a fuller buffer, or the next version, with an empty one."""
        scale = discount(current.version - sent.version, self.exponent)
        total = {
            k: _add(current.buffer.get(k, torch.zeros_like(old)), scale, trained[k] - old)
            for k, old in sent.model.items()
        }
        if (number := current.num_buffered + 1) < self.size:
            return Versioned(current.model, current.version, total, number)
        step = self.server_rate / self.size
        model = {k: _add(old, step, total[k]) for k, old in current.model.items()}
        return Versioned(model, current.version + 1)


def next_node(node_ids: Sequence[int], busy: Collection[int], seed: int, number: int) -> int:
    """Draw the node for the push of this number (from 1), uniformly among those not busy."""
    idle = [node_id for node_id in node_ids if node_id not in busy]
    rng = numpy_generator(seed, number, SERVER, Stream.SAMPLE)
    return idle[int(rng.integers(len(idle)))]


@dataclass(frozen=True)
class _Task:
    node_id: int
    sent: Versioned
    expires_at: float


def run_async(
    grid: Grid,
    node_ids: Sequence[int],
    model: State,
    rule: Rule,
    config: Config,
    *,
    seconds: float,
    in_flight: int = 10,
    rest_s: float = REST_S,
) -> tuple[Versioned, list[str]]:
    """Keep ``in_flight`` trainings going for ``seconds``; what is still out then is given up.

    A message whose time-to-live, ``config.reply_timeout``, is over counts as lost, and its node as
    idle again. ``server_round`` is the number of the push, so no two trainings share their chance;
    which version a message carried, the server remembers. The learning rate is constant.

    Args:
        grid: The way to the nodes.
        node_ids: Whom to ask, in the order of their partitions (``Nodes.roll_call``).
        model: What training starts from.
        rule: What to do with a node's model: ``FedAsync(...)``, ``FedBuff(...)``, or your own.
        config: Its ``dataset``, ``seed``, ``learning_rate`` and ``reply_timeout`` are used.
        seconds: How long to train.
        in_flight: How many nodes train at a time.
        rest_s: How long to rest after a look that found nothing.

    Returns:
        The model that is current at the end, and a line for each message that came to nothing.

    Raises:
        ConfigError: There are fewer nodes than trainings in flight.
    """
    if not 1 <= in_flight <= len(node_ids):
        raise ConfigError(
            f"in_flight: expected 1 to {len(node_ids)}, as many as there are nodes, got {in_flight}"
        )
    current, problems = Versioned(model), list[str]()
    number, waiting, end = 0, dict[str, _Task](), time.monotonic() + seconds
    while time.monotonic() < end:
        while len(waiting) < in_flight:
            number += 1
            busy = {task.node_id for task in waiting.values()}
            node_id = next_node(node_ids, busy, config.seed, number)
            request = TrainRequest(current.model, number, config.dataset, config.learning_rate)
            message = Message(encode(request), node_id, TRAIN, ttl=config.reply_timeout)
            pushed = list(grid.push_messages([message]))  # without an id if it could not be sent
            expires_at = time.monotonic() + config.reply_timeout
            waiting |= dict.fromkeys(pushed, _Task(node_id, current, expires_at))
            if not pushed:
                problems.append(f"node {node_id}: the message could not be sent")
                break
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            task = waiting.pop(reply.metadata.reply_to_message_id, None)
            if task is None:  # it came twice
                continue
            try:
                following = rule(current, task.sent, _read(reply, model))
                check_state(following.model, model)  # a sum may be too large for float32
                if following.buffer:
                    check_state(following.buffer, model)
                current = following
            except ReplyError as error:
                problems.append(f"node {task.node_id}: {one_line(error)}"[:REASON_LENGTH])
        now = time.monotonic()
        for message_id in [i for i, task in waiting.items() if now >= task.expires_at]:
            lost = waiting.pop(message_id)
            problems.append(f"node {lost.node_id}: no reply within {config.reply_timeout:g} s")
        if not replies:
            time.sleep(rest_s)
    return current, problems


def _read(reply: Message, reference: State) -> State:
    if reply.has_error():
        raise ReplyError(reply.error.reason or f"error {reply.error.code} without a reason")
    model = decode(TrainReply, reply.content).model
    check_state(model, reference)
    return model


def _add(start: torch.Tensor, factor: float, change: torch.Tensor) -> torch.Tensor:
    """Return ``start + factor * change`` in the dtype of ``start`` (an integer is rounded)."""
    moved = start + factor * change
    return moved if start.is_floating_point() else moved.round().to(start.dtype)
