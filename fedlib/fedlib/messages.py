"""The wire: what every message carries, under which key, and how it is read back.

One encode/decode pair for each verb and direction; no record key appears anywhere else.

    TRAIN           model, config(server-round, dataset, learning-rate)
      reply         model, metrics(num-examples, loss-sum, loss-weight)
    QUERY           config(server-round)
      reply         config(opt-in)
    QUERY.identify  nothing
      reply         config(partition-id, num-partitions)
    EVALUATE        model, config(server-round, dataset)
      reply         metrics(num-examples, loss-sum, num-correct)

Every decoder raises ``ReplyError`` when a record or key is missing, unknown, of another type,
or a number is not finite: a reply is used whole or not at all.

Source: ``RecordDict``, ``ArrayRecord``, ``ConfigRecord`` and ``MetricRecord`` of ``flwr.app``.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from fedlib.errors import ReplyError

if TYPE_CHECKING:  # a node answers a QUERY without PyTorch, whose import takes two seconds
    from fedlib.model import State
    from fedlib.training import Evaluation, Weighted

TRAIN = MessageType.TRAIN
EVALUATE = MessageType.EVALUATE
QUERY = MessageType.QUERY
IDENTIFY_ACTION = "identify"
IDENTIFY = f"{QUERY}.{IDENTIFY_ACTION}"

MAX_EXAMPLES = 10**12
"""More than any node holds; it keeps a liar from overflowing the server's sums."""

_MODEL, _CONFIG, _METRICS = "model", "config", "metrics"


@dataclass(frozen=True)
class TrainRequest:
    """What a node is told when it shall train."""

    model: "State"
    server_round: int
    dataset: str
    learning_rate: float


@dataclass(frozen=True)
class TrainReply:
    """What a node answers: its model, its weight in the mean, its training loss."""

    model: "State"
    num_examples: int
    loss: "Weighted"


@dataclass(frozen=True)
class EvaluateRequest:
    """What a node is told when it shall evaluate."""

    model: "State"
    server_round: int
    dataset: str


@dataclass(frozen=True)
class Identity:
    """Which of how many partitions a node holds."""

    partition_id: int
    num_partitions: int


def encode_model(state: "State") -> ArrayRecord:
    """Serialise a model once; the same record can go into every message of a round."""
    return ArrayRecord({name: tensor.detach().cpu() for name, tensor in state.items()})


def encode_train_request(
    model: ArrayRecord, server_round: int, dataset: str, learning_rate: float
) -> RecordDict:
    """Return the content of a TRAIN message."""
    config = ConfigRecord(
        {"server-round": server_round, "dataset": dataset, "learning-rate": learning_rate}
    )
    return RecordDict({_MODEL: model, _CONFIG: config})


def decode_train_request(content: RecordDict) -> TrainRequest:
    """Read the content of a TRAIN message."""
    _expect_records(content, _MODEL, _CONFIG)
    wanted = {"server-round": int, "dataset": str, "learning-rate": float}
    server_round, dataset, learning_rate = _values(content, _CONFIG, wanted)
    return TrainRequest(_model(content), server_round, dataset, learning_rate)


def encode_train_reply(reply: TrainReply) -> RecordDict:
    """Return the content of the reply to a TRAIN message."""
    loss = {"loss-sum": reply.loss.sum, "loss-weight": reply.loss.weight}
    metrics = MetricRecord({"num-examples": reply.num_examples, **loss})
    return RecordDict({_MODEL: encode_model(reply.model), _METRICS: metrics})


def decode_train_reply(content: RecordDict) -> TrainReply:
    """Read the content of the reply to a TRAIN message."""
    from fedlib.training import Weighted

    _expect_records(content, _MODEL, _METRICS)
    wanted = {"num-examples": int, "loss-sum": float, "loss-weight": int}
    num_examples, loss_sum, loss_weight = _values(content, _METRICS, wanted)
    _expect_count("num-examples", num_examples, 1)
    _expect_count("loss-weight", loss_weight, 1)
    return TrainReply(_model(content), num_examples, Weighted(loss_sum, loss_weight))


def encode_evaluate_request(model: ArrayRecord, server_round: int, dataset: str) -> RecordDict:
    """Return the content of an EVALUATE message."""
    config = ConfigRecord({"server-round": server_round, "dataset": dataset})
    return RecordDict({_MODEL: model, _CONFIG: config})


def decode_evaluate_request(content: RecordDict) -> EvaluateRequest:
    """Read the content of an EVALUATE message."""
    _expect_records(content, _MODEL, _CONFIG)
    server_round, dataset = _values(content, _CONFIG, {"server-round": int, "dataset": str})
    return EvaluateRequest(_model(content), server_round, dataset)


def encode_evaluate_reply(evaluation: "Evaluation") -> RecordDict:
    """Return the content of the reply to an EVALUATE message."""
    loss = {"loss-sum": evaluation.loss.sum, "num-correct": int(evaluation.correct.sum)}
    metrics = MetricRecord({"num-examples": evaluation.loss.weight, **loss})
    return RecordDict({_METRICS: metrics})


def decode_evaluate_reply(content: RecordDict) -> "Evaluation":
    """Read the content of the reply to an EVALUATE message."""
    from fedlib.training import Evaluation, Weighted

    _expect_records(content, _METRICS)
    wanted = {"num-examples": int, "loss-sum": float, "num-correct": int}
    num_examples, loss_sum, num_correct = _values(content, _METRICS, wanted)
    _expect_count("num-examples", num_examples, 1)
    _expect_count("num-correct", num_correct, 0, num_examples)
    return Evaluation(Weighted(loss_sum, num_examples), Weighted(num_correct, num_examples))


def encode_query_request(server_round: int) -> RecordDict:
    """Return the content of a QUERY message."""
    return RecordDict({_CONFIG: ConfigRecord({"server-round": server_round})})


def decode_query_request(content: RecordDict) -> int:
    """Read the content of a QUERY message: the round."""
    _expect_records(content, _CONFIG)
    return int(_values(content, _CONFIG, {"server-round": int})[0])


def encode_query_reply(opt_in: bool) -> RecordDict:
    """Return the content of the reply to a QUERY message."""
    return RecordDict({_CONFIG: ConfigRecord({"opt-in": opt_in})})


def decode_query_reply(content: RecordDict) -> bool:
    """Read the content of the reply to a QUERY message: did the node opt in."""
    _expect_records(content, _CONFIG)
    opt_in: bool = _values(content, _CONFIG, {"opt-in": bool})[0]
    return opt_in


def encode_identity(identity: Identity) -> RecordDict:
    """Return the content of the reply to a QUERY.identify message."""
    config = ConfigRecord(
        {"partition-id": identity.partition_id, "num-partitions": identity.num_partitions}
    )
    return RecordDict({_CONFIG: config})


def decode_identity(content: RecordDict) -> Identity:
    """Read the content of the reply to a QUERY.identify message."""
    _expect_records(content, _CONFIG)
    wanted = {"partition-id": int, "num-partitions": int}
    partition_id, num_partitions = _values(content, _CONFIG, wanted)
    _expect_count("num-partitions", num_partitions, 1)
    _expect_count("partition-id", partition_id, 0, num_partitions - 1)
    return Identity(partition_id, num_partitions)


def count_bytes(content: RecordDict) -> int:
    """Return the size in bytes of all values and keys in a message's content.

    Raises:
        ReplyError: Flower cannot size a value (an empty text or list, in 1.41).
    """
    try:
        return sum(record.count_bytes() for record in content.values())
    except (ValueError, IndexError) as error:
        raise ReplyError(f"content: expected values that have a size, got {error}") from error


def _expect_records(content: RecordDict, *names: str) -> None:
    if set(content) != set(names):
        raise ReplyError(f"content: expected the records {_list(names)}, got {_list(content)}")


def _values(content: RecordDict, record_name: str, wanted: Mapping[str, type]) -> list[Any]:
    kind = ConfigRecord if record_name == _CONFIG else MetricRecord
    found = content[record_name]
    if not isinstance(found, kind):
        came = type(found).__name__
        raise ReplyError(f"{record_name}: expected a {kind.__name__}, got {came}")
    record: Mapping[str, Any] = dict(found)
    if set(record) != set(wanted):
        raise ReplyError(f"{record_name}: expected the keys {_list(wanted)}, got {_list(record)}")
    for key, wanted_type in wanted.items():
        value: Any = record[key]
        not_finite = isinstance(value, float) and not math.isfinite(value)
        if type(value) is not wanted_type or not_finite:
            expected = "a finite float" if wanted_type is float else wanted_type.__name__
            raise ReplyError(
                f"{record_name}: {key}: expected {expected}, got {reprlib.repr(value)}"
            )
    return [record[key] for key in wanted]


def _model(content: RecordDict) -> "State":
    record = content[_MODEL]
    if not isinstance(record, ArrayRecord):
        raise ReplyError(f"{_MODEL}: expected an ArrayRecord, got {type(record).__name__}")
    try:
        return dict(record.to_torch_state_dict())
    except Exception as error:  # bytes that are no array, an unknown dtype ...
        raise ReplyError(f"{_MODEL}: expected readable arrays, got {error}") from error


def _expect_count(key: str, value: int, lowest: int, highest: int = MAX_EXAMPLES) -> None:
    if not lowest <= value <= highest:
        raise ReplyError(f"{key}: expected {lowest} to {highest}, got {value}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
