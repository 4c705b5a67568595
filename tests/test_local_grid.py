"""The LocalGrid against what Flower documents of a Grid."""

import time
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlib import LocalGrid
from fedlib.local_grid import CLIENT_RAISED

Handler = Callable[[Message, Context], Message]


def content(number: int) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"number": number})})


def number_in(message: Message) -> object:
    return message.content["config"]["number"]


def double(message: Message, context: Context) -> Message:
    number = number_in(message)
    assert isinstance(number, int)
    return Message(content(2 * number), reply_to=message)


def make_grid(handler: Handler, num_nodes: int) -> LocalGrid:
    app = ClientApp()
    app.train()(handler)
    return LocalGrid(app, num_nodes, {"seed": 3})


def push(grid: Grid, numbers: list[int], ttl: float = 60.0) -> list[str]:
    nodes = list(grid.get_node_ids())
    messages = [
        Message(content(n), nodes[i % len(nodes)], "train", ttl=ttl) for i, n in enumerate(numbers)
    ]
    return list(grid.push_messages(messages))


def pull_each(grid: Grid, ids: list[str]) -> list[Message]:
    return [reply for message_id in ids for reply in grid.pull_messages([message_id])]


def test_it_is_a_grid_with_one_node_a_partition() -> None:
    grid = make_grid(double, 4)
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [2, 3, 4, 5]
    for node_id, context in grid.contexts.items():
        assert context.node_id == node_id
        assert context.node_config == {"partition-id": node_id - 2, "num-partitions": 4}
        assert context.run_config == {"seed": 3}


def test_a_reply_is_a_copy_of_what_the_app_returned() -> None:
    def count(message: Message, context: Context) -> Message:
        kept["config"]["number"] = int(str(kept["config"]["number"])) + 1
        return Message(kept, reply_to=message)

    kept = content(0)
    grid = make_grid(count, 1)
    replies = [reply for i in push(grid, [7, 7, 7]) for reply in grid.pull_messages([i])]
    assert [number_in(reply) for reply in replies] == [1, 2, 3]


def test_a_reply_that_is_no_message_is_an_error_of_that_node() -> None:
    grid = make_grid(lambda message, context: content(1), 1)  # type: ignore[arg-type, return-value]
    [reply] = grid.pull_messages(push(grid, [7]))
    assert reply.error.reason.startswith(
        "TypeError: expected a Message as the reply, got RecordDict"
    )


def test_nothing_runs_before_the_first_pull_and_then_one_message_a_pull() -> None:
    ran = []

    def handler(message: Message, context: Context) -> Message:
        ran.append(context.node_config["partition-id"])
        return double(message, context)

    grid = make_grid(handler, 3)
    ids = push(grid, [1, 2, 3])
    for count in (0, 1, 2):
        assert ran == list(range(count))
        assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages(ids)) == []
    assert ran == [0, 1, 2]


def test_a_pull_returns_the_reply_to_the_message_that_it_names() -> None:
    grid = make_grid(double, 2)
    ids = push(grid, [1, 2, 3]) + push(grid, [4])
    assert len(set(ids)) == 4
    assert list(grid.pull_messages(["no such message"])) == []
    for index, message_id in reversed(list(enumerate(ids))):
        [reply] = grid.pull_messages([message_id])
        assert reply.metadata.reply_to_message_id == message_id
        assert reply.metadata.message_type == "train"
        assert number_in(reply) == 2 * (index + 1)
        assert reply.metadata.src_node_id == [2, 3, 2, 2][index]


def test_what_goes_wrong_on_a_node_comes_back_as_an_error_reply() -> None:
    def handler(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise ValueError("no luck")
        if context.node_id == 3:
            return Message(Error(123, "not today"), reply_to=message)
        return double(message, context)

    grid = make_grid(handler, 3)
    ids = push(grid, [1, 2, 3]) + list(grid.push_messages([Message(content(1), 2, "query")]))
    raised, refused, fine, unknown = pull_each(grid, ids)
    assert raised.error.code == CLIENT_RAISED
    line = handler.__code__.co_firstlineno + 2
    where = f"(test_local_grid.py, line {line}, in handler)"
    assert raised.error.reason == f"ValueError: no luck {where}"
    assert raised.metadata.reply_to_message_id == ids[0]
    assert (refused.error.code, refused.error.reason) == (123, "not today")
    assert number_in(fine) == 6
    assert "query" in unknown.error.reason  # there is no handler for it


@pytest.mark.parametrize(("timeout", "num_replies"), [(None, 3), (60.0, 3), (0.35, 1)])
def test_send_and_receive_returns_the_replies_before_the_timeout(
    timeout: float | None, num_replies: int
) -> None:
    def handler(message: Message, context: Context) -> Message:
        time.sleep(0.2 if timeout == 0.35 else 0)
        return double(message, context)

    grid = make_grid(handler, 3)
    messages = [Message(content(n), n + 2, "train") for n in range(3)]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    assert list(map(number_in, replies)) == [0, 2, 4][:num_replies]


def test_a_node_keeps_its_state_and_no_other_nodes_message() -> None:
    """One content goes to all nodes, as ``Nodes.ask`` sends it; an engine copies it."""

    def handler(message: Message, context: Context) -> Message:
        state = context.state.setdefault("seen", ConfigRecord({"count": 0}))
        state["count"] += 1
        number, message.content["config"]["number"] = number_in(message), -1
        return Message(content(100 * state["count"] + number), reply_to=message)

    grid, shared = make_grid(handler, 2), content(5)
    ids = grid.push_messages([Message(shared, node_id, "train") for node_id in (2, 3, 2)])
    assert list(map(number_in, pull_each(grid, list(ids)))) == [105, 105, 205]
