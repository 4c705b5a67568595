"""The ClientApp's handlers, called through a LocalGrid."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

import fedlib
from apps import NUM_NODES, Watched, make_config
from fedlib import CNN, Config, LocalGrid, Stream, client_app, make_client_app, messages, state_hash
from fedlib.client_app import REFUSED, seconds_left
from fedlib.messages import IDENTIFY, EvaluateRequest, QueryRequest, TrainReply, decode, encode
from fedlib.training import single_thread

ROUND = 3
VERBS = ["train", "evaluate", "query", IDENTIFY]


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    return make_config(tiny_folder, tmp_path)


@pytest.fixture
def model() -> CNN:
    return CNN(torch.Generator().manual_seed(7))


def ask(
    app: ClientApp, verb: str, content: RecordDict, partition_id: int = 0, **given: Any
) -> Message:
    """Return one node's reply (``run_config`` and ``node_config`` can be given)."""
    grid = LocalGrid(app, NUM_NODES, given.get("run_config"))
    context = grid.contexts[partition_id + 2]
    context.node_config |= given.get("node_config", {})
    [reply] = grid.pull_messages(grid.push_messages([Message(content, partition_id + 2, verb)]))
    return reply


def train_content(config: Config, model: CNN, learning_rate: float = 0.1) -> RecordDict:
    return encode(messages.TrainRequest(model.state_dict(), ROUND, config.dataset, learning_rate))


def trained(config: Config, model: CNN, partition_id: int = 0, learning_rate: float = 0.1) -> str:
    """Return the hash of the model that a node makes of this one."""
    content = train_content(config, model, learning_rate)
    reply = ask(make_client_app(config), "train", content, partition_id)
    return state_hash(decode(TrainReply, reply.content).model)


def test_train_reply_equals_training_by_hand(config: Config, model: CNN) -> None:
    config = replace(config, local_epochs=2, batch_size=16, momentum=0.5, augmentation=False)
    reply = ask(make_client_app(config), "train", train_content(config, model), 2)
    answer = decode(TrainReply, reply.content)
    dataset = fedlib.open_dataset(config.dataset)
    split = fedlib.load_partition(dataset, NUM_NODES, 1.0, config.seed, 2).train
    with single_thread():
        loss = fedlib.train(
            model,
            split,
            epochs=2,
            batch_size=16,
            learning_rate=0.1,
            momentum=0.5,
            generator=fedlib.torch_generator(config.seed, ROUND, 2, Stream.TRAIN),
            augmentation=False,
        )
    assert answer.num_examples == len(split)
    assert answer.loss == loss
    assert loss.weight == 2 * len(split)
    assert state_hash(answer.model) == state_hash(model.state_dict())


def test_evaluate_reply_equals_evaluating_by_hand(config: Config, model: CNN) -> None:
    content = encode(EvaluateRequest(model.state_dict(), ROUND, config.dataset))
    reply = ask(make_client_app(config), "evaluate", content, 3)
    dataset = fedlib.open_dataset(config.dataset)
    split = fedlib.load_partition(dataset, NUM_NODES, 1.0, config.seed, 3).validation
    with single_thread():
        expected = fedlib.evaluate(model, split)
    answer = decode(messages.EvaluateReply, reply.content)
    assert (answer.loss, answer.accuracy) == (expected.loss, expected.accuracy)
    assert answer.num_examples == len(split)
    assert set(reply.content) == {"metrics"}  # the model stays where it is


def test_training_depends_on_seed_round_and_partition_alone(config: Config, model: CNN) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = trained(config, model)
    other = trained(config, model, partition_id=1), trained(replace(config, seed=1), model)
    assert trained(config, model) == first
    assert len({first, *other}) == 3
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# --- QUERY -------------------------------------------------------------------------------------


def opt_ins(config: Config, server_round: int, num_nodes: int = 10) -> list[bool]:
    grid, content = (
        LocalGrid(make_client_app(config), num_nodes),
        encode(QueryRequest(server_round)),
    )
    ids = list(grid.push_messages([Message(content, i, "query") for i in grid.get_node_ids()]))
    replies = [reply for i in ids for reply in grid.pull_messages([i])]
    return [decode(messages.QueryReply, reply.content).opt_in for reply in replies]


def test_query_is_decided_by_seed_round_and_partition_alone(config: Config) -> None:
    first = opt_ins(config, 1)
    assert len(set(first)) == 2
    assert opt_ins(config, 2) != first == opt_ins(config, 1)
    assert opt_ins(replace(config, seed=1), 1) != first
    assert opt_ins(replace(config, query_max_delay=0.02), 1) == first
    assert 150 < sum(opt_ins(config, 1, 400)) < 250  # a half, give or take five deviations


def test_a_query_waits_for_its_delay_from_the_moment_of_sending(config: Config) -> None:
    rngs = [fedlib.numpy_generator(config.seed, 1, i, Stream.QUERY) for i in range(NUM_NODES)]
    delays = [(rng.random(), rng.random() * 0.4)[1] for rng in rngs]
    app = Watched(replace(config, query_max_delay=0.4))
    grid = LocalGrid(app, NUM_NODES)
    sent = [Message(encode(QueryRequest(1)), i, "query") for i in grid.get_node_ids()]
    for message_id in list(grid.push_messages(sent)):
        list(grid.pull_messages([message_id]))
    for message, reply, delay in zip(sent, app.replies, delays, strict=True):
        assert reply.metadata.created_at - message.metadata.created_at >= delay
    # Waiting one behind the other would have taken the sum of the delays.
    assert time.time() - sent[0].metadata.created_at < sum(delays) + 0.4


@pytest.mark.parametrize("verb", VERBS)
def test_an_expired_message_is_answered_at_once_and_not_delivered(
    config: Config, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app.messages, "decode", None)  # nobody looks into it
    app = Watched(config)
    grid = LocalGrid(app, NUM_NODES)
    message = Message(RecordDict(), 2, verb, ttl=0.001)
    ids = grid.push_messages([message])
    time.sleep(0.01)
    assert seconds_left(message) < 0
    assert grid.pull_messages(ids) == []
    [reply] = app.replies
    assert reply.has_error() and "expired" in reply.error.reason
    assert reply.metadata.created_at + reply.metadata.ttl < time.time()


def test_a_delay_beyond_the_time_to_live_is_not_slept(config: Config) -> None:
    app = Watched(replace(config, query_max_delay=86_400.0))
    grid, began = LocalGrid(app, NUM_NODES), time.monotonic()
    asked = [Message(encode(QueryRequest(1)), i, "query", ttl=5.0) for i in grid.get_node_ids()]
    assert [grid.pull_messages([i]) for i in list(grid.push_messages(asked))] == [[]] * NUM_NODES
    assert time.monotonic() - began < 4
    assert all("would take" in reply.error.reason for reply in app.replies)


# --- what is in the way, in one line -----------------------------------------------------------


def expect_one_line(reply: Message, *parts: str) -> None:
    assert reply.has_error() and reply.error.code == REFUSED
    assert "\n" not in reply.error.reason and "Traceback" not in reply.error.reason
    for part in parts:
        assert part in reply.error.reason, reply.error.reason


@pytest.mark.parametrize("value", [None, "0"])
@pytest.mark.parametrize("key", ["partition-id", "num-partitions"])
def test_a_bad_node_config_comes_back_as_one_line(config: Config, key: str, value: Any) -> None:
    reply = ask(make_client_app(config), IDENTIFY, RecordDict(), node_config={key: value})
    expect_one_line(reply, "expected a node config", f"{key!r}: {value!r}", "--node-config")


Spoil = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("fc2.bias"), "missing ['fc2.bias']"),
        (lambda s: s.update({"fc2.bias": torch.zeros(11)}), "(11,)"),
        (lambda s: s.update({"fc2.bias": torch.full((10,), torch.nan)}), "10 of 10 NaN"),
    ],
)
def test_a_model_of_another_kind_comes_back_as_one_line(
    config: Config, model: CNN, spoil: Spoil, words: str
) -> None:
    state, app = fedlib.clone_state(model), make_client_app(config)
    spoil(state)
    for request in (
        messages.TrainRequest(state, 1, config.dataset, 0.1),
        EvaluateRequest(state, 1, config.dataset),
    ):
        verb = type(request).__name__.removesuffix("Request").lower()
        expect_one_line(ask(app, verb, encode(request)), "model state: ", "expected", words)


def test_what_else_is_in_the_way_comes_back_as_one_line(config: Config, model: CNN) -> None:
    app, content = make_client_app(config), train_content(config, model)
    for number in (NUM_NODES, -1):
        reply = ask(app, "train", content, node_config={"partition-id": number})
        expect_one_line(reply, f"partition {number}: expected 0 to 3")
    reply = ask(app, "train", content, node_config={"num-partitions": 50})
    expect_one_line(reply, "120 training examples", "50 partitions", "dirichlet-alpha")
    elsewhere = train_content(replace(config, dataset="/no/such/folder"), model)
    expect_one_line(ask(app, "train", elsewhere), "dataset: expected", "'/no/such/folder'")
    for verb in ("train", "evaluate", "query"):
        expect_one_line(ask(app, verb, RecordDict()), "expected the records", "got nothing")


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a\nbug")


def test_what_nobody_foresaw_comes_back_as_one_line_that_names_the_apps_own_code(
    config: Config, model: CNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app, "train", broken)
    reply = ask(make_client_app(config), "train", train_content(config, model))
    line = broken.__code__.co_firstlineno + 1
    expect_one_line(reply, f"ZeroDivisionError: a bug (test_client_app.py, line {line}, in broken)")


# --- where the config comes from ---------------------------------------------------------------


def test_without_a_config_it_is_read_from_the_run_config(config: Config, model: CNN) -> None:
    config = replace(config, local_epochs=2, seed=5)
    content = train_content(config, model)
    reply = ask(make_client_app(), "train", content, run_config=config.to_run_config())
    answer = decode(TrainReply, reply.content)
    assert state_hash(answer.model) == trained(config, model)
    reply = ask(make_client_app(), "train", content, run_config={"seed": -1})
    expect_one_line(reply, "seed", "got -1")
    reply = ask(make_client_app(config), "train", content, run_config={"seed": -1})
    assert not reply.has_error()  # a config that was given outweighs it


def test_identify_tells_the_partition(config: Config) -> None:
    reply = ask(make_client_app(config), IDENTIFY, RecordDict(), 3)
    assert decode(messages.Identity, reply.content) == messages.Identity(3, NUM_NODES)
