"""The nodes as the server sees them: who is there, and what becomes of each reply."""

import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from apps import NUM_NODES, FlakyGrid
from fedlib import Config, FedlibError, LocalGrid, Nodes, Stage, messages
from fedlib.messages import EVALUATE, IDENTIFY, QUERY, TRAIN, EvaluateReply, count_bytes, encode
from fedlib.nodes import sample

BAD = 1  # the partition that misbehaves; it is on node 3
STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(3)}
REQUESTS: dict[str, Any] = {
    TRAIN: messages.TrainRequest(STATE, 1, "any", 0.1),
    QUERY: messages.QueryRequest(1),
    EVALUATE: messages.EvaluateRequest(STATE, 1, "any"),
}
REPLIES: dict[str, Any] = {
    TRAIN: messages.TrainReply(STATE, 5, 1.5, 5),
    QUERY: messages.QueryReply(True),
    EVALUATE: EvaluateReply(5, 1.5, 3),
}
Spoil = Callable[[RecordDict], object]


class Node(ClientApp):
    """Answers at once, without data; one node's answers to one verb pass through ``spoil``."""

    def __init__(self, verb: str = "", spoil: Spoil = lambda content: None) -> None:
        super().__init__()
        self.verb, self.spoil = verb, spoil
        self.seen: list[tuple[str, int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        verb, config = message.metadata.message_type, context.node_config
        partition = config["partition-id"]
        self.seen.append((verb, partition))
        if verb == IDENTIFY:
            content = encode(messages.Identity(partition, config["num-partitions"]))
        else:
            content = encode(REPLIES[verb])
        if verb == self.verb and partition == BAD:
            other = self.spoil(content)
            if isinstance(other, Error | RecordDict):
                return Message(other, reply_to=message)
        return Message(content, reply_to=message)


def ask(grid: LocalGrid, verb: str, timeout_s: float = 20.0) -> tuple[list[int], Stage]:
    """Return the partitions whose replies could be used, and what was counted."""
    nodes, stage = Nodes(grid), Stage()
    online = nodes.roll_call(20.0, wait_for_all=True)
    replies = nodes.ask(verb, online, encode(REQUESTS[verb]), stage, timeout_s)
    usable = [nodes.partitions[node_id] for node_id, _ in replies]
    assert stage.num_sent == stage.num_received + stage.num_errors + stage.num_missing
    assert stage.num_received == len(usable)
    return usable, stage


# --- replies that cannot be used ---------------------------------------------------------------


def raises(error: Exception) -> Spoil:
    def spoil(content: RecordDict) -> None:
        raise error

    return spoil


def model(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(content: RecordDict) -> None:
        state = dict(content["model"].to_torch_state_dict())
        change(state)
        content["model"] = ArrayRecord(state)

    return spoil


def bias(value: torch.Tensor) -> Spoil:
    return model(lambda state: state.update(bias=value))


def junk(content: RecordDict) -> None:
    array = content["model"]["bias"]
    content["model"]["bias"] = Array(array.dtype, array.shape, array.stype, b"junk")


def metrics(**values: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        kept = dict(content["metrics"]) | {k.replace("_", "-"): v for k, v in values.items()}
        content["metrics"] = MetricRecord({k: v for k, v in kept.items() if v is not None})

    return spoil


def opt_in(value: Any) -> Spoil:
    return lambda content: RecordDict({"config": ConfigRecord({"opt-in": value})})


def nothing(content: RecordDict) -> RecordDict:
    return RecordDict()


FAULTS: list[tuple[str, Spoil, str]] = [
    (TRAIN, raises(ValueError("no\nluck")), "ValueError.*no luck"),
    (TRAIN, lambda content: Error(7, "on\nstrike"), "on strike"),
    (TRAIN, lambda content: Error(7), "error 7 without a reason"),
    (TRAIN, bias(torch.tensor([1, math.nan, 1])), "bias: expected finite values, got 1 of 3 NaN"),
    (TRAIN, metrics(loss_sum=1.7e308), r"loss-sum: expected 0.0 to 1e\+51, got 1.7e\+308"),
    (TRAIN, model(lambda state: state.pop("bias")), r"global model's names, got missing.*bias"),
    (TRAIN, bias(torch.ones(1, 3)), r"expected float32 of shape \(3,\), got float32 .*\(1, 3\)"),
    (TRAIN, junk, "model: expected readable arrays"),
    (TRAIN, metrics(num_examples=0), "num-examples: expected 1 to .*, got 0"),
    (TRAIN, metrics(num_examples=None), "metrics: expected the keys .*num-examples"),
    (TRAIN, metrics(loss_sum=math.nan), "loss-sum: expected a finite float, got nan"),
    (TRAIN, nothing, "expected the records metrics, model, got nothing"),
    (QUERY, raises(KeyError("mood")), "KeyError.*mood"),
    (QUERY, opt_in(1), "opt-in: expected bool, got 1"),
    (EVALUATE, metrics(loss_sum=math.nan), "loss-sum: expected a finite float, got nan"),
    (EVALUATE, metrics(loss_sum=1e200), r"loss-sum: expected 0.0 to 1e\+51, got 1e\+200"),
    (EVALUATE, metrics(loss_sum=-5.0), r"loss-sum: expected 0.0 to 1e\+51, got -5"),
    (EVALUATE, metrics(num_correct=6), "num-correct: expected 0 to 5, got 6"),
]


@pytest.mark.parametrize(("verb", "spoil", "words"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_a_reply_that_cannot_be_used_is_counted_named_and_left_out(
    verb: str, spoil: Spoil, words: str
) -> None:
    usable, stage = ask(FlakyGrid(Node(verb, spoil)), verb)
    assert usable == [0, 2, 3]
    assert (stage.num_received, stage.num_errors, stage.num_missing) == (3, 1, 0)
    [problem] = stage.problems
    assert problem.startswith(f"node 3 (partition {BAD}): ")
    assert re.search(words, problem) and "\n" not in problem, problem


@pytest.mark.parametrize("verb", [TRAIN, QUERY, EVALUATE])
def test_a_reply_that_does_not_come_in_time_is_missing(verb: str) -> None:
    def lose(reply: Message) -> bool:
        return reply.metadata.message_type == verb and reply.metadata.src_node_id == BAD + 2

    usable, stage = ask(FlakyGrid(Node(), lose), verb, timeout_s=0.5)
    assert usable == [0, 2, 3]
    assert (stage.num_received, stage.num_errors, stage.num_missing) == (3, 0, 1)
    late = [f"node 3 (partition {BAD}): no reply within 0.5 s"]
    assert stage.problems == ([] if verb == QUERY else late)  # to be late for QUERY is usual
    assert 0.5 <= stage.seconds < 5


def test_bytes_are_those_of_the_contents() -> None:
    usable, stage = ask(FlakyGrid(Node()), TRAIN)
    assert usable == [0, 1, 2, 3]
    assert stage.bytes_sent == NUM_NODES * count_bytes(encode(REQUESTS[TRAIN]))
    assert stage.bytes_received == NUM_NODES * count_bytes(encode(REPLIES[TRAIN]))


# --- who is there ------------------------------------------------------------------------------


def test_nodes_are_in_the_order_of_their_partitions_and_asked_once() -> None:
    app = Node()
    grid = FlakyGrid(app)
    for node_id, partition in ((2, 3), (3, 1), (4, 0), (5, 2)):
        grid.contexts[node_id].node_config["partition-id"] = partition
    nodes = Nodes(grid)
    assert nodes.roll_call(20.0, wait_for_all=True) == nodes.roll_call(20.0) == [4, 3, 5, 2]
    assert len(app.seen) == NUM_NODES
    chosen = sample([4, 3, 5, 2], Config(fraction_clients_train=0.5), 1)
    assert sample([40, 30, 50, 20], Config(fraction_clients_train=0.5), 1) == [
        10 * node_id for node_id in chosen
    ]


def test_nodes_that_come_and_go_are_known_when_they_come_back() -> None:
    app = Node()
    grid = FlakyGrid(app)
    nodes = Nodes(grid)
    grid.online = [2, 4, 5]
    assert nodes.roll_call(0.3, wait_for_all=True) == [2, 4, 5]  # the time is up
    for online in ([2, 3, 4, 5], [3, 4], [2, 3, 5]):
        grid.online = online
        assert nodes.roll_call(20.0) == online
    assert sorted(app.seen) == [(IDENTIFY, partition) for partition in range(NUM_NODES)]


def test_without_any_node_the_error_says_what_to_start() -> None:
    grid = FlakyGrid(Node())
    grid.online = []
    with pytest.raises(FedlibError, match=r"nodes within 0.1 s, got none; start SuperNodes"):
        Nodes(grid).roll_call(0.1)


def test_a_new_node_is_waited_for_once_and_not_for_long() -> None:
    lost = [False]
    app = Node()
    grid = FlakyGrid(app, lambda reply: lost[0] and reply.metadata.src_node_id == BAD + 2)
    nodes = Nodes(grid)
    grid.online = [2, 4]
    assert nodes.roll_call(20.0, new_timeout_s=0.5) == [2, 4]
    lost[0], grid.online = True, [2, 3, 4, 5]
    began = time.monotonic()
    assert nodes.roll_call(20.0, new_timeout_s=0.5) == [2, 4, 5]  # 3 is silent
    assert 0.5 <= time.monotonic() - began < 5
    began = time.monotonic()
    assert nodes.roll_call(20.0, new_timeout_s=20.0) == [2, 4, 5]
    assert time.monotonic() - began < 5


def test_where_nodes_are_connected_and_silent_the_error_says_so() -> None:
    grid = FlakyGrid(Node(), lambda reply: True)
    with pytest.raises(FedlibError, match=r"an answer within 0.1 s, got none from 4 connected"):
        Nodes(grid).roll_call(0.1, wait_for_all=True)


def test_a_silent_node_holds_up_no_later_roll_call_and_is_asked_again() -> None:
    app, lost = Node(), [True]
    grid = FlakyGrid(app, lambda reply: lost[0] and reply.metadata.src_node_id == BAD + 2)
    nodes = Nodes(grid)
    assert nodes.roll_call(0.3, wait_for_all=True) == [2, 4, 5]
    began = time.monotonic()
    for _ in range(20):
        assert nodes.roll_call(2.0) == [2, 4, 5]
    assert time.monotonic() - began < 5  # 20 times 2 s, had each of them waited
    assert app.seen.count((IDENTIFY, BAD)) == 2  # its first question had expired
    time.sleep(2.0)
    lost[0] = False
    assert nodes.roll_call(0.5) == [2, 3, 4, 5]


def test_a_node_that_does_not_say_its_partition_is_left_out_and_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nodes = Nodes(FlakyGrid(Node(IDENTIFY, raises(ValueError("who am I?")))))
    assert nodes.roll_call(0.3, wait_for_all=True) == [2, 4, 5]
    assert re.search(r"⚠️ roll call: node 3: .*who am I\?", capsys.readouterr().out)


def test_two_nodes_with_one_partition_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    grid = FlakyGrid(Node())
    grid.contexts[3].node_config["partition-id"] = 0
    assert Nodes(grid).roll_call(20.0) == [2, 3, 4, 5]
    assert "roll call: partition 0: held by 2 nodes" in capsys.readouterr().out


def test_a_node_that_counts_other_partitions_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it is the first to answer: the majority decides."""
    grid = FlakyGrid(Node())
    grid.contexts[2].node_config["num-partitions"] = 50
    nodes = Nodes(grid)
    assert nodes.roll_call(0.3, wait_for_all=True) == [3, 4, 5] == nodes.roll_call(0.3)
    line = "⚠️ roll call: node 2: num-partitions: expected 4 as of most nodes, got 50; give all"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("order", [[2, 3, 4, 5], [5, 4, 3, 2]])
def test_of_two_equal_halves_the_same_one_takes_part_whoever_answers_first(
    order: list[int],
) -> None:
    grid = FlakyGrid(Node())
    grid.contexts = {node_id: grid.contexts[node_id] for node_id in order}
    grid.contexts[2].node_config["num-partitions"] = 50
    grid.contexts[3].node_config["num-partitions"] = 50
    grid.online = []
    nodes = Nodes(grid)
    for node_id in order:  # each answers before the next has come
        grid.online.append(node_id)
        nodes.roll_call(0.05, wait_for_all=True)
    assert nodes.roll_call(0.05, wait_for_all=True) == [2, 3]


class Expiring(FlakyGrid):
    """Its nodes answer when they are asked; as a SuperLink, it hands out nothing that has expired.

    One node's answers take ``delay_s`` seconds.
    """

    def __init__(self, delay_s: float) -> None:
        super().__init__(Node())
        self.delay_s = delay_s
        self.ready: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for message_id in ids:
            for reply in super().pull_messages([message_id]):
                late = reply.metadata.src_node_id == BAD + 2
                self.ready[message_id] = time.time() + late * self.delay_s, reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.time()
        ids = [i for i in message_ids if i in self.ready and self.ready[i][0] <= now]
        replies = [self.ready.pop(message_id)[1] for message_id in ids]
        return [r for r in replies if now <= r.metadata.created_at + r.metadata.ttl]


def test_a_node_that_joins_takes_part_also_where_its_answer_expires_before_the_next_round() -> None:
    grid = Expiring(0.1)
    nodes = Nodes(grid)
    grid.online = [2, 4, 5]
    assert nodes.roll_call(0.3) == [2, 4, 5]
    grid.online = [2, 3, 4, 5]
    assert nodes.roll_call(0.3, new_timeout_s=0.0) == [2, 4, 5]  # it waits for nobody
    grid.lose = lambda reply: reply.metadata.src_node_id == 2
    content = encode(REQUESTS[EVALUATE])
    assert len(list(nodes.ask(EVALUATE, [2, 4, 5], content, Stage(), 0.4))) == 2
    assert nodes.roll_call(0.3) == [2, 3, 4, 5]


def test_a_reply_that_comes_shortly_before_it_expires_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedlib.nodes.POLL_SHARE", 1.0)  # looks at 0.02, 0.04, ... 1.28 and 2.4 s,
    monkeypatch.setattr("fedlib.nodes.MAX_POLL_INTERVAL_S", 10.0)  # but for the end
    grid, stage = Expiring(0.0), Stage()
    nodes = Nodes(grid)
    online = nodes.roll_call(20.0, wait_for_all=True)
    grid.delay_s = 1.5
    list(nodes.ask(EVALUATE, online, encode(REQUESTS[EVALUATE]), stage, 2.4))
    assert (stage.num_received, stage.num_missing) == (NUM_NODES, 0)


def test_a_reply_that_comes_during_the_last_pause_counts() -> None:
    class Slow(FlakyGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            held.extend(super().pull_messages(message_ids))
            return [held.pop() for _ in held[:]] if time.monotonic() >= opens else []

    held, opens = list[Message](), 0.0
    grid, stage = Slow(Node()), Stage()
    nodes = Nodes(grid)
    online = nodes.roll_call(20.0, wait_for_all=True)
    opens = time.monotonic() + 0.5
    list(nodes.ask(EVALUATE, online, encode(REQUESTS[EVALUATE]), stage, 0.5))
    assert (stage.num_received, stage.num_missing) == (NUM_NODES, 0)
