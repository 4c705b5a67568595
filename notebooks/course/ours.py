"""What stands in for the main exercises of 05 and 07 until they are solved.

A notebook goes on with the learner's function once its check is green, and with these until then.
"""

import time
from collections.abc import Collection, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlib import Config, Nodes, Stage
from fedlib.messages import QUERY, TRAIN, QueryRequest, encode
from fedlib.nodes import sample

REST_S = 0.02

Replies = dict[int, tuple[float, Message]]
"""By the node's id: after how many seconds its reply was there, and the reply."""


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
