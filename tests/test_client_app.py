"""The ClientApp's handlers, called directly and through a LocalGrid."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from apps import Recording
from fedlib import client_app as client_app_module
from fedlib import messages
from fedlib.client_app import REFUSED, make_client_app, seconds_left
from fedlib.config import Config
from fedlib.data import load_partition, open_dataset
from fedlib.local_grid import LocalGrid
from fedlib.model import CNN, clone_state, state_hash
from fedlib.randomness import Stream, torch_generator
from fedlib.training import evaluate, single_thread, train

NUM_NODES = 5
ROUND = 3


@pytest.fixture
def model() -> CNN:
    return CNN(torch.Generator().manual_seed(7))


def ask(
    app: ClientApp,
    message_type: str,
    content: RecordDict,
    partition_id: int = 0,
    ttl: float = 60.0,
    run_config: dict[str, Any] | None = None,
) -> list[Message]:
    grid = LocalGrid(app, NUM_NODES, run_config)
    message = Message(content, partition_id + 2, message_type, ttl=ttl)
    ids = grid.push_messages([message])
    return list(grid.pull_messages(ids))


def train_content(config: Config, state: CNN, learning_rate: float = 0.1) -> RecordDict:
    model = messages.encode_model(state.state_dict())
    return messages.encode_train_request(model, ROUND, config.dataset, learning_rate)


def evaluate_content(config: Config, state: CNN) -> RecordDict:
    model = messages.encode_model(state.state_dict())
    return messages.encode_evaluate_request(model, ROUND, config.dataset)


def test_train_reply_equals_training_by_hand(small_config: Config, model: CNN) -> None:
    config = dataclasses.replace(small_config, local_epochs=2, batch_size=16, momentum=0.5)
    [reply] = ask(make_client_app(config), "train", train_content(config, model), 2)
    answer = messages.decode_train_reply(reply.content)

    partition = load_partition(open_dataset(config.dataset), NUM_NODES, 1.0, config.seed, 2)
    with single_thread():
        loss = train(
            model,
            partition.train,
            epochs=2,
            batch_size=16,
            learning_rate=0.1,
            momentum=0.5,
            generator=torch_generator(config.seed, ROUND, 2, Stream.TRAIN),
        )
    assert answer.num_examples == len(partition.train)
    assert answer.loss == loss
    assert loss.weight == 2 * len(partition.train)
    assert state_hash(answer.model) == state_hash(model.state_dict())


def test_evaluate_reply_equals_evaluating_by_hand(small_config: Config, model: CNN) -> None:
    app = make_client_app(small_config)
    [reply] = ask(app, "evaluate", evaluate_content(small_config, model), 4)
    partition = load_partition(
        open_dataset(small_config.dataset), NUM_NODES, 1.0, small_config.seed, 4
    )
    with single_thread():
        expected = evaluate(model, partition.validation)
    answer = messages.decode_evaluate_reply(reply.content)
    assert answer == expected
    assert answer.loss.weight == len(partition.validation)
    assert "model" not in reply.content


def test_training_twice_gives_the_same_reply_and_leaves_the_global_generator(
    small_config: Config, model: CNN
) -> None:
    app, content = make_client_app(small_config), train_content(small_config, model)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (ask(app, "train", content, 1)[0] for _ in range(2))
    hashes = [state_hash(messages.decode_train_reply(r.content).model) for r in (first, second)]
    assert hashes[0] == hashes[1]
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_nodes_and_rounds_train_differently(small_config: Config, model: CNN) -> None:
    app, state = make_client_app(small_config), messages.encode_model(model.state_dict())
    hashes = set()
    for server_round, partition_id in ((1, 0), (2, 0), (1, 1)):
        content = messages.encode_train_request(state, server_round, small_config.dataset, 0.1)
        [reply] = ask(app, "train", content, partition_id)
        hashes.add(state_hash(messages.decode_train_reply(reply.content).model))
    assert len(hashes) == 3


def test_the_message_decides_the_learning_rate(small_config: Config, model: CNN) -> None:
    config = dataclasses.replace(small_config, learning_rate=9.0)
    replies = [
        ask(make_client_app(c), "train", train_content(config, model, 0.01))[0]
        for c in (config, small_config)
    ]
    first, second = (messages.decode_train_reply(reply.content) for reply in replies)
    assert state_hash(first.model) == state_hash(second.model)


def opt_ins(config: Config, server_round: int) -> list[bool]:
    app = make_client_app(config)
    content = messages.encode_query_request(server_round)
    replies = [ask(app, "query", content, partition_id)[0] for partition_id in range(NUM_NODES)]
    return [messages.decode_query_reply(reply.content) for reply in replies]


def test_query_is_decided_by_seed_round_and_partition_alone(small_config: Config) -> None:
    config = small_config
    answers = {server_round: opt_ins(config, server_round) for server_round in range(1, 13)}
    assert {r: opt_ins(config, r) for r in reversed(range(1, 13))} == answers
    other_seed = dataclasses.replace(config, seed=config.seed + 1)
    assert {r: opt_ins(other_seed, r) for r in range(1, 13)} != answers
    assert len({tuple(row) for row in answers.values()}) > 1
    assert any(len(set(row)) > 1 for row in answers.values())


def test_the_delay_does_not_change_the_answer(small_config: Config) -> None:
    slower = dataclasses.replace(small_config, query_max_delay=0.05)
    assert opt_ins(slower, 1) == opt_ins(small_config, 1)


def test_about_half_of_the_nodes_opt_in(small_config: Config) -> None:
    app = make_client_app(small_config)
    grid = LocalGrid(app, 400)
    content = messages.encode_query_request(1)
    ids = grid.push_messages([Message(content, i, "query") for i in grid.get_node_ids()])
    answers = [messages.decode_query_reply(grid.pull_messages([i])[0].content) for i in ids]
    assert 150 < sum(answers) < 250  # five standard deviations


def test_a_query_waits_for_its_delay_from_the_moment_of_sending(small_config: Config) -> None:
    config = dataclasses.replace(small_config, query_max_delay=0.4)
    app = make_client_app(config)
    grid = LocalGrid(app, NUM_NODES)
    content = messages.encode_query_request(1)
    sent = [Message(content, i, "query") for i in grid.get_node_ids()]
    rngs = [
        client_app_module.numpy_generator(config.seed, 1, i, Stream.QUERY) for i in range(NUM_NODES)
    ]
    delays = [(rng.random(), rng.random() * 0.4)[1] for rng in rngs]
    ids = grid.push_messages(sent)
    for message, message_id, delay in zip(sent, ids, delays, strict=True):
        [reply] = grid.pull_messages([message_id])
        assert reply.metadata.created_at - message.metadata.created_at >= delay
    # Waiting one behind the other would have taken the sum of the delays.
    assert time.time() - sent[0].metadata.created_at < sum(delays) + 0.4


@pytest.mark.parametrize("message_type", ["train", "evaluate", "query", "query.identify"])
def test_an_expired_message_is_answered_at_once_and_not_delivered(
    small_config: Config, message_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the handler worked on a message that had expired")

    monkeypatch.setattr("fedlib.data.load_partition", never)
    monkeypatch.setattr(client_app_module, "numpy_generator", never)
    app = Recording(make_client_app(dataclasses.replace(small_config, query_max_delay=30.0)))
    grid = LocalGrid(app, NUM_NODES)
    message = Message(RecordDict(), 2, message_type, ttl=0.001)
    ids = grid.push_messages([message])
    time.sleep(0.01)
    assert seconds_left(message) < 0
    began = time.monotonic()
    assert grid.pull_messages(ids) == []
    assert time.monotonic() - began < 5
    [reply] = app.replies
    assert reply.has_error() and "expired" in reply.error.reason
    assert reply.metadata.created_at + reply.metadata.ttl < time.time()


def test_a_delay_beyond_the_time_to_live_is_not_slept(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s for an answer that nobody can get")

    monkeypatch.setattr(client_app_module.time, "sleep", never)
    app = Recording(make_client_app(dataclasses.replace(small_config, query_max_delay=86_400.0)))
    began = time.monotonic()
    for partition_id in range(NUM_NODES):
        assert ask(app, "query", messages.encode_query_request(1), partition_id, ttl=1.0) == []
    assert time.monotonic() - began < 5
    assert all("would take" in reply.error.reason for reply in app.replies)


BAD_NODE_CONFIGS: dict[str, dict[str, Any]] = {
    "empty": {},
    "no number of partitions": {"partition-id": 0},
    "text": {"partition-id": "0", "num-partitions": 5},
    "fraction": {"partition-id": 0.0, "num-partitions": 5},
    "flag": {"partition-id": True, "num-partitions": 5},
}


def expect_one_line(reply: Message, *parts: str) -> None:
    assert reply.has_error()
    assert reply.error.code == REFUSED
    reason = reply.error.reason
    assert "\n" not in reason and "Traceback" not in reason
    for part in parts:
        assert part in reason, reason


@pytest.mark.parametrize("node_config", BAD_NODE_CONFIGS.values(), ids=BAD_NODE_CONFIGS)
def test_a_bad_node_config_comes_back_as_one_line(
    small_config: Config, node_config: dict[str, Any]
) -> None:
    grid = LocalGrid(make_client_app(small_config), NUM_NODES)
    grid.contexts[2].node_config = node_config
    ids = grid.push_messages([Message(RecordDict(), 2, messages.IDENTIFY)])
    [reply] = grid.pull_messages(ids)
    expect_one_line(reply, "partition-id", "num-partitions", repr(node_config))


@pytest.mark.parametrize("node_config", [{"partition-id": 5}, {"partition-id": -1}])
def test_a_partition_out_of_range_comes_back_as_one_line(
    small_config: Config, model: CNN, node_config: dict[str, Any]
) -> None:
    grid = LocalGrid(make_client_app(small_config), NUM_NODES)
    grid.contexts[2].node_config = {**node_config, "num-partitions": NUM_NODES}
    ids = grid.push_messages([Message(train_content(small_config, model), 2, "train")])
    [reply] = grid.pull_messages(ids)
    expect_one_line(reply, f"partition {node_config['partition-id']}", "expected 0 to 4")


Spoil = Callable[[dict[str, torch.Tensor]], object]
SPOILED: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda s: s.pop("fc2.bias"), "missing: fc2.bias"),
    "unknown": (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
    "shape": (lambda s: s.update({"fc2.bias": torch.zeros(11)}), "(10,)"),
    "dtype": (lambda s: s.update({"fc2.bias": torch.zeros(10).double()}), "float64"),
    "nan": (lambda s: s.update({"fc2.bias": torch.full((10,), torch.nan)}), "10 of 10 NaN"),
}


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
@pytest.mark.parametrize(("spoil", "came"), SPOILED.values(), ids=SPOILED)
def test_a_model_of_another_kind_comes_back_as_one_line(
    small_config: Config, model: CNN, message_type: str, spoil: Spoil, came: str
) -> None:
    state = clone_state(model)
    spoil(state)
    record = messages.encode_model(state)
    if message_type == "train":
        content = messages.encode_train_request(record, 1, small_config.dataset, 0.1)
    else:
        content = messages.encode_evaluate_request(record, 1, small_config.dataset)
    [reply] = ask(make_client_app(small_config), message_type, content)
    expect_one_line(reply, "model state", "expected", came)


@pytest.mark.parametrize("message_type", ["train", "evaluate", "query"])
def test_an_empty_message_comes_back_as_one_line(small_config: Config, message_type: str) -> None:
    [reply] = ask(make_client_app(small_config), message_type, RecordDict())
    expect_one_line(reply, "expected the records", "got nothing")


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_an_unknown_dataset_comes_back_as_one_line(
    small_config: Config, model: CNN, message_type: str
) -> None:
    config = dataclasses.replace(small_config, dataset="/no/such/folder")
    content = (train_content if message_type == "train" else evaluate_content)(config, model)
    [reply] = ask(make_client_app(config), message_type, content)
    expect_one_line(reply, "dataset: expected", "'/no/such/folder'")


def test_a_partition_that_cannot_be_had_comes_back_as_one_line(
    small_config: Config, model: CNN
) -> None:
    grid = LocalGrid(make_client_app(small_config), NUM_NODES)
    grid.contexts[2].node_config = {"partition-id": 0, "num-partitions": 200}  # 6 examples each
    ids = grid.push_messages([Message(train_content(small_config, model), 2, "train")])
    [reply] = grid.pull_messages(ids)
    expect_one_line(reply, "1200 training examples", "200 partitions", "dirichlet-alpha")


def test_an_exception_that_nobody_foresaw_propagates(
    small_config: Config, model: CNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fedlib.training.train", broken)
    grid = LocalGrid(make_client_app(small_config), NUM_NODES)
    message = Message(train_content(small_config, model), 2, "train")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        grid.client_app(message, grid.contexts[2])


def test_without_a_config_it_is_read_from_the_run_config(small_config: Config, model: CNN) -> None:
    config = dataclasses.replace(small_config, local_epochs=2, seed=5)
    content, app = train_content(config, model), make_client_app()
    [reply] = ask(app, "train", content, run_config=config.to_run_config())
    [expected] = ask(make_client_app(config), "train", content)
    [default] = ask(app, "train", content)
    hashes = [
        state_hash(messages.decode_train_reply(r.content).model) for r in (reply, expected, default)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_given_config_outweighs_the_run_config(small_config: Config) -> None:
    app = make_client_app(small_config)
    [reply] = ask(app, "query", messages.encode_query_request(1), run_config={"seed": -1})
    assert not reply.has_error()


def test_a_wrong_run_config_comes_back_as_one_line() -> None:
    content = messages.encode_query_request(1)
    [reply] = ask(make_client_app(), "query", content, run_config={"seed": -1})
    expect_one_line(reply, "seed", "got -1")


def test_identify_tells_the_partition(small_config: Config) -> None:
    [reply] = ask(make_client_app(small_config), messages.IDENTIFY, RecordDict(), 3)
    assert messages.decode_identity(reply.content) == messages.Identity(3, NUM_NODES)
