"""The wire: what goes in comes out, and nothing else is let in."""

import io
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlib import CNN, ConfigError, ReplyError, messages, state_hash
from fedlib.messages import EvaluateReply, EvaluateRequest, Identity, TrainReply, TrainRequest

STATE = {
    "weight": torch.tensor([[1.5, -2.25], [1e-45, 3e38]]),
    "half": torch.tensor([0.1], dtype=torch.float16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}
MESSAGES: dict[Any, Any] = {
    TrainRequest: TrainRequest(STATE, 3, "fashion-mnist", 0.05),
    TrainReply: TrainReply(STATE, 40, 12.5, 80),
    EvaluateRequest: EvaluateRequest(STATE, 3, "fashion-mnist"),
    EvaluateReply: EvaluateReply(20, 9.5, 15),
    messages.QueryRequest: messages.QueryRequest(3),
    messages.QueryReply: messages.QueryReply(True),
    Identity: Identity(4, 50),
}
WIRE: dict[Any, dict[str, dict[str, Any]]] = {  # what the messages above are, on their way
    TrainRequest: {
        "model": STATE,
        "config": {"server-round": 3, "dataset": "fashion-mnist", "learning-rate": 0.05},
    },
    TrainReply: {
        "model": STATE,
        "metrics": {"num-examples": 40, "loss-sum": 12.5, "loss-weight": 80},
    },
    EvaluateRequest: {"model": STATE, "config": {"server-round": 3, "dataset": "fashion-mnist"}},
    EvaluateReply: {"metrics": {"num-examples": 20, "loss-sum": 9.5, "num-correct": 15}},
    messages.QueryRequest: {"config": {"server-round": 3}},
    messages.QueryReply: {"config": {"opt-in": True}},
    Identity: {"config": {"partition-id": 4, "num-partitions": 50}},
}
KINDS = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
WITH_MODEL = pytest.mark.parametrize(
    "kind", [TrainRequest, TrainReply, EvaluateRequest], ids=lambda kind: kind.__name__
)
KEYS = [(k, r, key) for k, rs in WIRE.items() for r in rs if r != "model" for key in rs[r]]
EACH_KEY = pytest.mark.parametrize(("kind", "record", "key"), KEYS)


def refuse(kind: Any, change: Callable[[Any], object]) -> str:
    content = messages.encode(MESSAGES[kind])
    change(content)
    with pytest.raises(ReplyError) as refusal:
        messages.decode(kind, content)
    text = str(refusal.value)
    assert "expected" in text and "got" in text
    assert "\n" not in text and len(text) < 500
    return text


@KINDS
def test_what_goes_in_comes_out(kind: Any) -> None:
    sent, content = MESSAGES[kind], messages.encode(MESSAGES[kind])
    assert set(content) == set(WIRE[kind])
    for name in set(content) - {"model"}:
        assert repr(dict(content[name])) == repr(WIRE[kind][name])  # repr: 1 is not 1.0, nor True
    came = vars(messages.decode(kind, content))
    if "model" in content:
        assert state_hash(came["model"]) == state_hash(STATE)
        came["model"] = STATE
    assert came == vars(sent)


def test_a_sent_model_is_a_copy_and_may_require_gradients() -> None:
    model = CNN(torch.Generator().manual_seed(0))
    content = messages.encode(EvaluateRequest(dict(model.named_parameters()), 1, "x"))
    before = state_hash(model.state_dict())
    with torch.no_grad():
        model.fc2.bias.zero_()
    came = messages.decode(EvaluateRequest, content).model
    assert state_hash(came) == before != state_hash(model.state_dict())
    assert list(came) == list(model.state_dict())


@KINDS
def test_a_missing_unknown_or_other_record_is_refused(kind: Any) -> None:
    for record in WIRE[kind]:
        assert record in refuse(kind, lambda content, record=record: content.pop(record))
    assert "surplus" in refuse(kind, lambda c: c.update({"surplus": ConfigRecord({"a": 1})}))
    assert "nothing" in refuse(kind, lambda content: content.clear())
    arrays, right = {"weight": Array(np.zeros(1, np.float32))}, messages.encode(MESSAGES[kind])
    for record in WIRE[kind]:
        for other in (ConfigRecord({"a": 1}), MetricRecord({"a": 1}), ArrayRecord(arrays)):
            if type(other) is not type(right[record]):
                text = refuse(kind, lambda c, r=record, o=other: c.update({r: o}))
                assert text.startswith(f"{record}: expected ")
                assert text.endswith(f"got {type(other).__name__}")


@EACH_KEY
def test_a_missing_or_unknown_key_is_refused(kind: Any, record: str, key: str) -> None:
    text = refuse(kind, lambda content: content[record].pop(key))
    assert text.startswith(f"{record}: expected the keys") and key in text
    assert "surplus" in refuse(kind, lambda content: content[record].update(surplus=1))


WRONG: dict[type, list[Any]] = {
    int: [True, 3.0, "3", b"3", [3]],
    float: [True, 1, "0.1", [0.1], math.nan, math.inf, -math.inf],
    str: [1, True, b"fashion-mnist", ["fashion-mnist"]],
    bool: [1, 0, 1.0, "true", [True]],
}


@EACH_KEY
def test_a_value_of_another_type_is_refused(kind: Any, record: str, key: str) -> None:
    for value in WRONG[type(WIRE[kind][record][key])]:
        # Flower itself keeps all but numbers out of a MetricRecord.
        if record != "metrics" or type(value) in (int, float, list):
            text = refuse(kind, lambda content, value=value: content[record].update({key: value}))
            assert text.startswith(f"{record}: {key}: expected") and text.endswith(repr(value))


@KINDS
def test_every_number_has_a_range(kind: Any) -> None:
    """A new one gets it by its metadata, or in ``__post_init__`` where it depends on others."""
    bare = [e.name for e in fields(kind) if e.type in (int, float) and "range" not in e.metadata]
    assert set(bare) <= {"partition_id", "num_correct"}


@pytest.mark.parametrize(
    ("message", "record", "key", "lowest", "highest"),
    [
        (TrainReply(STATE, 40, 12.5, 80), "metrics", "num-examples", 1, 10**12),
        (TrainReply(STATE, 40, 12.5, 80), "metrics", "loss-weight", 1, 10**12),
        (TrainRequest(STATE, 3, "any", 0.05), "config", "server-round", 0, 10**12),
        (EvaluateReply(20, 9.5, 0), "metrics", "num-examples", 1, 10**12),
        (EvaluateReply(20, 9.5, 15), "metrics", "num-correct", 0, 20),
        (Identity(4, 50), "config", "partition-id", 0, 49),
        (Identity(0, 50), "config", "num-partitions", 1, 10**12),
    ],
)
def test_a_value_out_of_range_is_refused(
    message: Any, record: str, key: str, lowest: int, highest: int
) -> None:
    kind = type(message)
    for value in (lowest - 1, -(2**62), highest + 1, 2**63 - 1):
        text = refuse(kind, lambda content, value=value: content[record].update({key: value}))
        assert text.startswith(f"{record}: {key}: expected {lowest} to ")
        assert text.endswith(f", got {value}")
    for value in (lowest, highest):
        content = messages.encode(message)
        content[record][key] = value
        assert messages.decode(kind, content)


def test_what_cannot_travel_is_named_before_it_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"model: b: expected a dtype .* got torch.bfloat16"):
        messages.encode_model({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.bfloat16)})


@WITH_MODEL
def test_an_array_that_cannot_be_read_is_refused_and_pickles_are_never_loaded(kind: Any) -> None:
    good, pickled = messages.encode_model(STATE)["weight"], io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    bodies = (good.data[:-3], good.data[:40], b"", b"not\nan\narray", pickled.getvalue())
    broken = [Array(good.dtype, good.shape, good.stype, body) for body in bodies]
    for array in (*broken, Array(good.dtype, good.shape, "pickle", good.data)):
        text = refuse(kind, lambda content, array=array: content["model"].update(weight=array))
        assert text.startswith("model: expected readable arrays, got ")


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
    for value in ("", b"", []):  # a node may send anything: to count it must not stop the server
        with pytest.raises(ReplyError, match="expected values that have a size"):
            messages.count_bytes(RecordDict({"config": ConfigRecord({"note": value})}))
