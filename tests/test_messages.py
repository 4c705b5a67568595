"""The wire: what goes in comes out, and nothing else is let in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import fedlib
from fedlib import messages
from fedlib.errors import ReplyError
from fedlib.messages import EvaluateRequest, Identity, TrainReply, TrainRequest
from fedlib.model import CNN, state_hash
from fedlib.training import Evaluation, Weighted

STATE = {
    "weight": torch.tensor([[1.5, -2.25], [1e-45, 3e38]]),
    "half": torch.tensor([0.1], dtype=torch.float16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}

Decode = Callable[[RecordDict], Any]
WIRE: dict[str, tuple[Decode, Callable[[], RecordDict]]] = {
    "train request": (
        messages.decode_train_request,
        lambda: messages.encode_train_request(
            messages.encode_model(STATE), 3, "fashion-mnist", 0.05
        ),
    ),
    "train reply": (
        messages.decode_train_reply,
        lambda: messages.encode_train_reply(TrainReply(STATE, 40, Weighted(12.5, 80))),
    ),
    "evaluate request": (
        messages.decode_evaluate_request,
        lambda: messages.encode_evaluate_request(messages.encode_model(STATE), 3, "fashion-mnist"),
    ),
    "evaluate reply": (
        messages.decode_evaluate_reply,
        lambda: messages.encode_evaluate_reply(Evaluation(Weighted(9.5, 20), Weighted(15, 20))),
    ),
    "query request": (
        messages.decode_query_request,
        lambda: messages.encode_query_request(3),
    ),
    "query reply": (
        messages.decode_query_reply,
        lambda: messages.encode_query_reply(True),
    ),
    "identity": (
        messages.decode_identity,
        lambda: messages.encode_identity(Identity(4, 50)),
    ),
}

RECORDS = [(verb, name) for verb, (_, make) in WIRE.items() for name in make()]
SCALAR_RECORDS = [(verb, name) for verb, name in RECORDS if name != "model"]
MODEL_VERBS = [verb for verb, name in RECORDS if name == "model"]
KEYS = [(verb, name, key) for verb, name in SCALAR_RECORDS for key in WIRE[verb][1]()[name]]


def refuse(verb: str, content: RecordDict) -> str:
    with pytest.raises(ReplyError) as refusal:
        WIRE[verb][0](content)
    text = str(refusal.value)
    assert "\n" not in text
    assert "expected" in text
    assert "got" in text
    return text


def test_train_request_round_trip() -> None:
    decode, make = WIRE["train request"]
    request = decode(make())
    assert isinstance(request, TrainRequest)
    assert (request.server_round, request.dataset, request.learning_rate) == (
        3,
        "fashion-mnist",
        0.05,
    )
    assert state_hash(request.model) == state_hash(STATE)


def test_train_reply_round_trip() -> None:
    decode, make = WIRE["train reply"]
    reply = decode(make())
    assert isinstance(reply, TrainReply)
    assert (reply.num_examples, reply.loss) == (40, Weighted(12.5, 80))
    assert state_hash(reply.model) == state_hash(STATE)


def test_evaluate_request_round_trip() -> None:
    decode, make = WIRE["evaluate request"]
    request = decode(make())
    assert isinstance(request, EvaluateRequest)
    assert (request.server_round, request.dataset) == (3, "fashion-mnist")
    assert state_hash(request.model) == state_hash(STATE)


@pytest.mark.parametrize(("num_correct", "num_examples"), [(0, 1), (1, 1), (15, 20), (20, 20)])
def test_evaluate_reply_round_trip(num_correct: int, num_examples: int) -> None:
    sent = Evaluation(Weighted(0.1 + 0.2, num_examples), Weighted(num_correct, num_examples))
    came = messages.decode_evaluate_reply(messages.encode_evaluate_reply(sent))
    assert came == sent
    assert type(came.loss.weight) is int


def test_query_and_identity_round_trip() -> None:
    assert messages.decode_query_request(messages.encode_query_request(7)) == 7
    for opt_in in (True, False):
        assert messages.decode_query_reply(messages.encode_query_reply(opt_in)) is opt_in
    identity = Identity(partition_id=0, num_partitions=50)
    assert messages.decode_identity(messages.encode_identity(identity)) == identity


def test_model_parameters_that_require_gradients_can_be_sent() -> None:
    model = CNN(torch.Generator().manual_seed(0))
    record = messages.encode_model(dict(model.named_parameters()))
    request = messages.decode_train_request(messages.encode_train_request(record, 1, "x", 0.1))
    assert state_hash(request.model) == state_hash(model.state_dict())
    assert list(request.model) == list(model.state_dict())


def test_a_sent_model_is_a_copy() -> None:
    state = {"w": torch.ones(3)}
    content = messages.encode_evaluate_request(messages.encode_model(state), 1, "x")
    state["w"].zero_()
    assert messages.decode_evaluate_request(content).model["w"].tolist() == [1.0, 1.0, 1.0]


def test_message_types_are_those_of_flower() -> None:
    assert (messages.TRAIN, messages.EVALUATE, messages.QUERY) == ("train", "evaluate", "query")
    assert messages.IDENTIFY == "query.identify"


@pytest.mark.parametrize(("verb", "name"), RECORDS)
def test_missing_record_is_refused(verb: str, name: str) -> None:
    content = WIRE[verb][1]()
    del content[name]
    assert name in refuse(verb, content)


@pytest.mark.parametrize("verb", WIRE)
def test_extra_record_is_refused(verb: str) -> None:
    content = WIRE[verb][1]()
    content["surplus"] = ConfigRecord({"a": 1})
    assert "surplus" in refuse(verb, content)


@pytest.mark.parametrize("verb", WIRE)
def test_empty_content_is_refused(verb: str) -> None:
    assert "nothing" in refuse(verb, RecordDict())


@pytest.mark.parametrize(("verb", "name", "key"), KEYS)
def test_missing_key_is_refused(verb: str, name: str, key: str) -> None:
    content = WIRE[verb][1]()
    del content[name][key]
    text = refuse(verb, content)
    assert name in text
    assert key in text


@pytest.mark.parametrize(("verb", "name"), SCALAR_RECORDS)
def test_extra_key_is_refused(verb: str, name: str) -> None:
    content = WIRE[verb][1]()
    content[name]["surplus"] = 1
    assert "surplus" in refuse(verb, content)


WRONG: dict[type, list[Any]] = {
    int: [True, 3.0, "3", b"3", [3]],
    float: [True, 1, "0.1", [0.1], math.nan, math.inf, -math.inf],
    str: [1, True, b"fashion-mnist", ["fashion-mnist"]],
    bool: [1, 0, 1.0, "true", [True]],
}


def wrong_values() -> list[tuple[str, str, str, Any]]:
    cases = []
    for verb, name, key in KEYS:
        record = WIRE[verb][1]()[name]
        for value in WRONG[type(record[key])]:
            # Flower itself keeps all but numbers out of a MetricRecord.
            if isinstance(record, ConfigRecord) or type(value) in (int, float, list):
                cases.append((verb, name, key, value))
    return cases


@pytest.mark.parametrize(("verb", "name", "key", "value"), wrong_values())
def test_value_of_another_type_is_refused(verb: str, name: str, key: str, value: Any) -> None:
    content = WIRE[verb][1]()
    content[name][key] = value
    text = refuse(verb, content)
    assert name in text
    assert key in text
    assert repr(value) in text


@pytest.mark.parametrize("count", [0, -1, -(2**62)])
@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("train reply", "num-examples"),
        ("train reply", "loss-weight"),
        ("evaluate reply", "num-examples"),
    ],
)
def test_count_below_one_is_refused_by_its_name(verb: str, key: str, count: int) -> None:
    content = WIRE[verb][1]()
    content["metrics"][key] = count
    text = refuse(verb, content)
    assert f"{key}: expected" in text
    assert str(count) in text


@pytest.mark.parametrize("num_correct", [-1, 21, 2**60])
def test_number_of_correct_predictions_must_fit(num_correct: int) -> None:
    content = WIRE["evaluate reply"][1]()
    content["metrics"]["num-correct"] = num_correct
    assert refuse("evaluate reply", content) == (
        f"num-correct: expected 0 to 20, got {num_correct}"
    )


@pytest.mark.parametrize(("verb", "name"), SCALAR_RECORDS)
def test_record_of_another_kind_is_refused(verb: str, name: str) -> None:
    content = WIRE[verb][1]()
    values = dict(content[name])
    arrays = ArrayRecord({key: torch.zeros(1) for key in values})
    if isinstance(content[name], MetricRecord):
        others: list[Any] = [ConfigRecord(values), arrays]
    else:
        others = [arrays]
        if all(type(value) in (int, float) for value in values.values()):
            others.append(MetricRecord(values))
    for other in others:
        content[name] = other
        assert name in refuse(verb, content)


@pytest.mark.parametrize("verb", MODEL_VERBS)
@pytest.mark.parametrize("record", [ConfigRecord({"weight": 1.0}), MetricRecord({"weight": 1.0})])
def test_model_of_another_kind_is_refused(verb: str, record: Any) -> None:
    content = WIRE[verb][1]()
    content["model"] = record
    assert "model: expected an ArrayRecord" in refuse(verb, content)


def broken_arrays() -> dict[str, Array]:
    good = messages.encode_model(STATE)["weight"]
    return {
        "truncated": Array(good.dtype, good.shape, good.stype, good.data[:-3]),
        "header only": Array(good.dtype, good.shape, good.stype, good.data[:40]),
        "no bytes": Array(good.dtype, good.shape, good.stype, b""),
        "no array": Array(good.dtype, good.shape, good.stype, b"not\nan\narray"),
        "other serialisation": Array(good.dtype, good.shape, "pickle", good.data),
    }


@pytest.mark.parametrize("verb", MODEL_VERBS)
@pytest.mark.parametrize("fault", broken_arrays())
def test_unreadable_array_is_refused(verb: str, fault: str) -> None:
    content = WIRE[verb][1]()
    content["model"]["weight"] = broken_arrays()[fault]
    assert "model: expected readable arrays" in refuse(verb, content)


def test_pickled_objects_are_never_loaded() -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    content = WIRE["train reply"][1]()
    content["model"]["weight"] = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    refuse("train reply", content)


def test_refusal_does_not_repeat_megabytes() -> None:
    content = messages.encode_query_request(1)
    content["config"]["server-round"] = "x" * 100_000
    assert len(refuse("query request", content)) < 1_000


def test_count_bytes_by_hand() -> None:
    content = RecordDict(
        {
            "config": ConfigRecord({"round": 1, "rate": 0.5, "on": True, "name": "abc"}),
            "metrics": MetricRecord({"n": 1, "loss": 0.5, "all": [1, 2, 3]}),
            "model": ArrayRecord({"w": Array("uint8", (4,), "raw", b"1234")}),
        }
    )
    config = (5 + 8) + (4 + 8) + (2 + 1) + (4 + 3)
    metrics = (1 + 8) + (4 + 8) + (3 + 3 * 8)
    assert messages.count_bytes(content) == config + metrics + (1 + 4)
    assert messages.count_bytes(RecordDict()) == 0


@pytest.mark.parametrize("value", ["", b"", []])
def test_count_bytes_refuses_what_flower_cannot_size(value: str | bytes | list) -> None:
    """A node may send anything: to count it must not stop the server."""
    content = RecordDict({"config": ConfigRecord({"note": value})})
    with pytest.raises(ReplyError, match="expected values that have a size"):
        messages.count_bytes(content)


@pytest.mark.parametrize("key", ["opt-in", "loss-sum", "num-correct", "loss-weight"])
def test_record_keys_appear_in_one_module_only(key: str) -> None:
    sources = sorted(Path(fedlib.__file__).parent.rglob("*.py"))
    holders = {
        source.name
        for source in sources
        for quote in "\"'"
        if f"{quote}{key}{quote}" in source.read_text(encoding="utf-8")
    }
    assert len(sources) > 10
    assert holders == {"messages.py"}
