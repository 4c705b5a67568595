"""The wire: what every message carries, under which key, and how it is read back.

Each message is one of the dataclasses below. They are the table: a field's metadata names the
record that carries it; the key is the field's name, spelt with hyphens. ``encode`` and ``decode``
read the table; no record key appears elsewhere, save those of ``fedlib.algorithms.messages``.

    TRAIN           TrainRequest         reply: TrainReply
    QUERY           QueryRequest         reply: QueryReply
    QUERY.identify  nothing              reply: Identity
    EVALUATE        EvaluateRequest      reply: EvaluateReply

``decode`` raises ``ReplyError`` when a record or key is missing, unknown, of another type, out of
range or not finite: a message is used whole or not at all.

Source: ``RecordDict``, ``ArrayRecord``, ``ConfigRecord`` and ``MetricRecord`` of ``flwr.app``.
"""

import math
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from fedlib.config import kebab
from fedlib.errors import ConfigError, ReplyError, one_line
from fedlib.model import State
from fedlib.training import Weighted

TRAIN, QUERY, EVALUATE = MessageType.TRAIN, MessageType.QUERY, MessageType.EVALUATE
IDENTIFY_ACTION = "identify"
IDENTIFY = f"{QUERY}.{IDENTIFY_ACTION}"

# The ranges of what comes over the wire: more than any honest node sends, and small enough that no
# liar can overflow the server's sums.
COUNT, ROUND = {"range": (1, 10**12)}, {"range": (0, 10**12)}  # 0 is before the first
LOSS_SUM = {"range": (0.0, 1e51)}  # of as many examples, each with the largest loss of float32
LEARNING_RATE = {"range": (0.0, 10.0)}
MODEL = {"record": "model", "kind": ArrayRecord}
CONFIG = {"record": "config", "kind": ConfigRecord}
METRICS = {"record": "metrics", "kind": MetricRecord}


@dataclass(frozen=True)
class TrainRequest:
    """What a node is told when it shall train."""

    model: State = field(metadata=MODEL)
    server_round: int = field(metadata=CONFIG | ROUND)
    dataset: str = field(metadata=CONFIG)
    learning_rate: float = field(metadata=CONFIG | LEARNING_RATE)


@dataclass(frozen=True)
class TrainReply:
    """Its answer: its model, its weight in the mean, and the loss (nats) as seen in training."""

    model: State = field(metadata=MODEL)
    num_examples: int = field(metadata=METRICS | COUNT)
    loss_sum: float = field(metadata=METRICS | LOSS_SUM)
    loss_weight: int = field(metadata=METRICS | COUNT)

    @property
    def loss(self) -> Weighted:
        """The training loss, summed over every example of every epoch."""
        return Weighted(self.loss_sum, self.loss_weight)


@dataclass(frozen=True)
class QueryRequest:
    """What a node is asked: will you evaluate in this round?"""

    server_round: int = field(metadata=CONFIG | ROUND)


@dataclass(frozen=True)
class QueryReply:
    """Its answer."""

    opt_in: bool = field(metadata=CONFIG)


@dataclass(frozen=True)
class Identity:
    """Which of how many partitions a node holds."""

    partition_id: int = field(metadata=CONFIG)
    num_partitions: int = field(metadata=CONFIG | COUNT)

    def __post_init__(self) -> None:
        _expect_between("config: partition-id", self.partition_id, 0, self.num_partitions - 1)


@dataclass(frozen=True)
class EvaluateRequest:
    """What a node is told when it shall evaluate."""

    model: State = field(metadata=MODEL)
    server_round: int = field(metadata=CONFIG | ROUND)
    dataset: str = field(metadata=CONFIG)


@dataclass(frozen=True)
class EvaluateReply:
    """Its answer: loss (nats) and correct predictions, summed over its examples."""

    num_examples: int = field(metadata=METRICS | COUNT)
    loss_sum: float = field(metadata=METRICS | LOSS_SUM)
    num_correct: int = field(metadata=METRICS)

    def __post_init__(self) -> None:
        _expect_between("metrics: num-correct", self.num_correct, 0, self.num_examples)

    @property
    def loss(self) -> Weighted:
        """The loss over all its examples."""
        return Weighted(self.loss_sum, self.num_examples)

    @property
    def accuracy(self) -> float:
        """Share of the examples that were classified correctly, from 0 to 1."""
        return self.num_correct / self.num_examples


T = TypeVar("T")
REPLIES = {TRAIN: TrainReply, QUERY: QueryReply, IDENTIFY: Identity, EVALUATE: EvaluateReply}


def encode_model(state: State) -> ArrayRecord:
    """Serialise a model once; the same record can go into every message of a round.

    Raises:
        ConfigError: A tensor has a dtype that NumPy, in whose format arrays travel, lacks.
    """
    arrays = {}
    for name, tensor in state.items():
        try:
            arrays[name] = Array(tensor.detach().cpu())
        except TypeError as error:
            raise ConfigError(
                f"model: {name}: expected a dtype that NumPy has too, as messages carry NumPy's "
                f"arrays, got {tensor.dtype}; keep this tensor in float32"
            ) from error
    return ArrayRecord(arrays)


def encode(message: Any, arrays: ArrayRecord | None = None) -> RecordDict:
    """Return a message as Flower sends it; ``arrays`` is its model, where already serialised."""
    records: dict[str, Any] = {}
    for entry in fields(message):
        record, kind = entry.metadata["record"], entry.metadata["kind"]
        value = getattr(message, entry.name)
        if kind is ArrayRecord:
            records[record] = arrays if arrays and record == "model" else encode_model(value)
        else:
            records.setdefault(record, kind())[kebab(entry.name)] = value
    return RecordDict(records)


def decode(kind: type[T], content: RecordDict) -> T:
    """Read a message's content as one of the dataclasses above.

    Raises:
        ReplyError: It is not that message; the text says what was expected and what came.
    """
    table: Any = fields(kind)  # type: ignore[arg-type]
    kinds = {entry.metadata["record"]: entry.metadata["kind"] for entry in table}
    _expect_names("content: expected the records", content, kinds)
    for name, wanted in kinds.items():
        if type(content[name]) is not wanted:
            came = type(content[name]).__name__
            raise ReplyError(f"{name}: expected {wanted.__name__}, got {came}")
        if wanted is not ArrayRecord:
            keys = [kebab(entry.name) for entry in table if entry.metadata["record"] == name]
            _expect_names(f"{name}: expected the keys", content[name], keys)
    return kind(**{entry.name: _decode_field(entry, content) for entry in table})


def sent_model(content: RecordDict) -> State | None:
    """Return the model in a message that we have made ourselves, if it carries one."""
    arrays: Any = content.get("model")
    return dict(arrays.to_torch_state_dict()) if isinstance(arrays, ArrayRecord) else None


def count_bytes(content: RecordDict) -> int:
    """Return the size in bytes of all values and keys in a message's content.

    Raises:
        ReplyError: Flower cannot size a value (an empty text or list, in 1.42).
    """
    try:
        return sum(record.count_bytes() for record in content.values())
    except (ValueError, IndexError) as error:
        raise ReplyError(f"content: expected values that have a size, got {error}") from error


def _expect_names(expected: str, came: Collection[str], wanted: Collection[str]) -> None:
    if set(came) != set(wanted):
        right, wrong = (", ".join(sorted(names)) or "nothing" for names in (wanted, came))
        raise ReplyError(f"{expected} {right}, got {wrong}")


def _expect_between(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ReplyError(f"{name}: expected {lowest} to {highest}, got {value}")


def _decode_field(entry: Any, content: RecordDict) -> Any:
    name, kind = entry.metadata["record"], entry.type
    record: Any = content[name]
    if isinstance(record, ArrayRecord):
        try:
            return dict(record.to_torch_state_dict())
        except Exception as error:  # bytes that are no array, an unknown dtype ...
            raise ReplyError(f"{name}: expected readable arrays, got {one_line(error)}") from error
    value, name = record[kebab(entry.name)], f"{name}: {kebab(entry.name)}"
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        expected = "a finite float" if kind is float else kind.__name__
        raise ReplyError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
    if "range" in entry.metadata:
        _expect_between(name, value, *entry.metadata["range"])
    return value
