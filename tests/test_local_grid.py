"""The LocalGrid against what Flower documents of a Grid."""

import time
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlib.local_grid import CLIENT_RAISED, LocalGrid

Handler = Callable[[Message, Context], Message]


def content(number: int) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"number": number})})


def make_app(handler: Handler) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def double(message: Message, context: Context) -> Message:
    number = message.content["config"]["number"]
    return Message(content(2 * number), reply_to=message)


def push(grid: Grid, numbers: list[int], ttl: float = 60.0) -> list[str]:
    nodes = list(grid.get_node_ids())
    messages = [
        Message(content(n), nodes[i % len(nodes)], "train", ttl=ttl) for i, n in enumerate(numbers)
    ]
    return list(grid.push_messages(messages))


def test_it_is_a_grid_with_one_node_a_partition() -> None:
    grid = LocalGrid(make_app(double), 4, {"seed": 3})
    assert isinstance(grid, Grid)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 4
    for partition_id, node_id in enumerate(nodes):
        context = grid.contexts[node_id]
        assert context.node_config == {"partition-id": partition_id, "num-partitions": 4}
        assert context.node_id == node_id
        assert context.run_config == {"seed": 3}


def test_nothing_runs_before_the_first_pull_and_then_one_message_a_pull() -> None:
    ran = []

    def handler(message: Message, context: Context) -> Message:
        ran.append(context.node_config["partition-id"])
        return double(message, context)

    grid = LocalGrid(make_app(handler), 3)
    ids = push(grid, [1, 2, 3])
    assert ran == []
    for count in (1, 2, 3):
        assert len(list(grid.pull_messages(ids))) == 1
        assert ran == list(range(count))
    assert list(grid.pull_messages(ids)) == []
    assert ran == [0, 1, 2]


def test_message_ids_are_unique_and_replies_name_the_message_they_answer() -> None:
    grid = LocalGrid(make_app(double), 2)
    ids = push(grid, [1, 2, 3]) + push(grid, [4])
    assert len(set(ids)) == 4
    nodes = list(grid.get_node_ids())
    for index, message_id in reversed(list(enumerate(ids))):
        [reply] = grid.pull_messages([message_id])
        assert reply.metadata.reply_to_message_id == message_id
        assert reply.content["config"]["number"] == 2 * (index + 1)
        assert reply.metadata.src_node_id == nodes[[0, 1, 0, 0][index]]
        assert reply.metadata.message_type == "train"


def test_a_pull_touches_only_the_messages_that_it_names() -> None:
    grid = LocalGrid(make_app(double), 2)
    first, second = push(grid, [1, 2])
    assert list(grid.pull_messages(["no such message"])) == []
    [reply] = grid.pull_messages([second])
    assert reply.content["config"]["number"] == 4
    [reply] = grid.pull_messages([first])
    assert reply.content["config"]["number"] == 2


def test_an_exception_comes_back_as_an_error_reply_and_the_next_node_is_served() -> None:
    def handler(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            raise ValueError("no luck")
        return double(message, context)

    grid = LocalGrid(make_app(handler), 2)
    ids = push(grid, [1, 2])
    replies = [reply for _ in ids for reply in grid.pull_messages(ids)]
    assert [reply.has_error() for reply in replies] == [True, False]
    assert replies[0].error.code == CLIENT_RAISED
    assert "ValueError" in replies[0].error.reason and "no luck" in replies[0].error.reason
    assert replies[0].metadata.reply_to_message_id == ids[0]


def test_a_message_type_without_a_handler_comes_back_as_an_error_reply() -> None:
    grid = LocalGrid(make_app(double), 1)
    ids = grid.push_messages([Message(content(1), 2, "query")])
    [reply] = grid.pull_messages(ids)
    assert reply.has_error()
    assert "query" in reply.error.reason


def test_an_error_reply_of_the_app_passes_unchanged() -> None:
    def handler(message: Message, context: Context) -> Message:
        return Message(Error(123, "not today"), reply_to=message)

    grid = LocalGrid(make_app(handler), 1)
    [reply] = grid.pull_messages(push(grid, [1]))
    assert (reply.error.code, reply.error.reason) == (123, "not today")


def test_a_late_reply_is_dropped() -> None:
    def handler(message: Message, context: Context) -> Message:
        time.sleep(0.3 if context.node_config["partition-id"] == 0 else 0)
        return double(message, context)

    grid = LocalGrid(make_app(handler), 2)
    late, _ = push(grid, [1, 2], ttl=0.1)
    assert list(grid.pull_messages([late])) == []
    assert list(grid.pull_messages([late])) == []
    [reply] = grid.pull_messages(push(grid, [3, 4], ttl=30.0)[1:])
    assert reply.content["config"]["number"] == 8


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_send_and_receive_returns_every_reply(timeout: float | None) -> None:
    grid = LocalGrid(make_app(double), 3)
    messages = [Message(content(n), n + 2, "train") for n in range(3)]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    assert [reply.content["config"]["number"] for reply in replies] == [0, 2, 4]


def test_send_and_receive_leaves_out_what_comes_after_the_timeout() -> None:
    def handler(message: Message, context: Context) -> Message:
        time.sleep(0.2)
        return double(message, context)

    grid = LocalGrid(make_app(handler), 10)
    messages = [Message(content(n), n + 2, "train") for n in range(10)]
    replies = list(grid.send_and_receive(messages, timeout=0.35))
    assert len(replies) == 1


def test_a_node_keeps_its_state_between_messages() -> None:
    def handler(message: Message, context: Context) -> Message:
        seen = context.state.get("seen", ConfigRecord({"count": 0}))["count"]
        context.state["seen"] = ConfigRecord({"count": seen + 1})
        return Message(content(seen), reply_to=message)

    grid = LocalGrid(make_app(handler), 2)
    replies = [next(iter(grid.pull_messages([i]))) for i in push(grid, [0, 0, 0])]
    assert [reply.content["config"]["number"] for reply in replies] == [0, 0, 1]


def test_an_app_that_changes_a_message_does_not_change_the_next_nodes_message() -> None:
    """One content goes to all nodes, as ``Federation.ask`` sends it; an engine copies it."""

    def handler(message: Message, context: Context) -> Message:
        number = message.content["config"]["number"]
        message.content["config"]["number"] = -1
        return Message(content(number), reply_to=message)

    grid = LocalGrid(make_app(handler), 2)
    shared = content(5)
    ids = grid.push_messages([Message(shared, node_id, "train") for node_id in (2, 3)])
    replies = [next(iter(grid.pull_messages([i]))) for i in ids]
    assert [reply.content["config"]["number"] for reply in replies] == [5, 5]
