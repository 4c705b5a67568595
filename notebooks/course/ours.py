"""What stands in for exercises of 03, 05 and 07 until they are solved.

A notebook goes on with the learner's function once its check is green, and with these until then.
"""

import time
from collections.abc import Callable, Collection, Sequence

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlib import Config, Nodes, Stage
from fedlib.client_app import REFUSED, seconds_left
from fedlib.errors import TooLateError, one_line
from fedlib.messages import QUERY, TRAIN, QueryRequest, TrainReply, TrainRequest, decode, encode
from fedlib.model import State
from fedlib.nodes import sample
from fedlib.training import Weighted

REST_S = 0.02

Train = Callable[[State, int, str, float], tuple[State, int, Weighted]]
"""From a state, a round, a data set's name and a learning rate: state, examples and loss."""

Replies = dict[int, tuple[float, Message]]
"""By the node's id: after how many seconds its reply was there, and the reply."""


def train_message(
    state: State,
    server_round: int,
    dataset: str,
    learning_rate: float,
    node_id: int,
    ttl_s: float,
) -> Message:
    """Return the message that asks a node to train."""
    content = encode(TrainRequest(state, server_round, dataset, learning_rate))
    return Message(content, dst_node_id=node_id, message_type=TRAIN, ttl=ttl_s)


def train_reply(message: Message, train: Train) -> Message:
    """Return the reply to a message that asks to train; an error of one line if that fails."""
    try:
        if seconds_left(message) <= 0:
            raise TooLateError("the message had expired when its turn came")
        asked = decode(TrainRequest, message.content)
        state, num_examples, loss = train(
            asked.model, asked.server_round, asked.dataset, asked.learning_rate
        )
        reply = TrainReply(state, num_examples, loss.sum, loss.weight)
        return Message(encode(reply), reply_to=message)
    except Exception as error:
        return Message(Error(REFUSED, one_line(error)), reply_to=message)


def train_round(
    grid: Grid,
    nodes: Sequence[int],
    config: Config,
    server_round: int,
    content: RecordDict,
    timeout_s: float,
) -> tuple[Replies, dict[int, str], set[int]]:
    """Have a sample of the nodes train, and wait for them until the time is up.

    Unlike ``Nodes.ask``, this takes whatever a reply carries, such as a clock's times.

    Returns:
        The usable replies; why others failed, by the node's id; and the nodes that were silent.
    """
    began, waiting = time.monotonic(), dict[str, int]()
    for node_id in sample(nodes, config, server_round):
        message = Message(content, node_id, TRAIN, ttl=timeout_s)
        waiting |= dict.fromkeys(grid.push_messages([message]), node_id)
    replies, errors = Replies(), dict[int, str]()
    while waiting and time.monotonic() < began + timeout_s:
        for reply in grid.pull_messages(list(waiting)):
            node_id = waiting.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                errors[node_id] = reply.error.reason or f"error {reply.error.code}"
            else:
                replies[node_id] = time.monotonic() - began, reply
        time.sleep(REST_S)
    return replies, errors, set(waiting.values())


def ideal_round(durations: Sequence[float], num_workers: int) -> float:
    """Return after how many seconds the last task is done, if each goes to whoever is free."""
    free_at = [0.0] * num_workers
    for seconds in durations:
        free_at[free_at.index(min(free_at))] += seconds
    return max(free_at)


def yes_rate(heard: float, truth_probability: float) -> float:
    """Return the true yes-rate, as answers suggest of which some come from a fair coin."""
    return (heard - (1 - truth_probability) / 2) / truth_probability


def query(
    grid: Grid, node_ids: Collection[int], server_round: int, timeout_s: float
) -> tuple[dict[int, float], dict[int, float], dict[str, int]]:
    """Ask nodes whether they will evaluate, by ``Nodes.ask``.

    Returns:
        After how many seconds who said yes, and who no; and how many failed or were silent.
    """
    began, stage = time.monotonic(), Stage()
    yes, no = dict[int, float](), dict[int, float]()
    content = encode(QueryRequest(server_round))
    for node_id, reply in Nodes(grid).ask(QUERY, node_ids, content, stage, timeout_s):
        (yes if reply.opt_in else no)[node_id] = time.monotonic() - began
    return yes, no, {"errors": stage.num_errors, "silent": stage.num_missing}
