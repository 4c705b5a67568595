"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.

    QUERY.keys      KeysRequest          reply: KeysReply        (secure aggregation)
    TRAIN.masked    MaskedRequest        reply: MaskedReply
    QUERY.reveal    RevealRequest        reply: RevealReply
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from fedlib.errors import ReplyError
from fedlib.messages import CONFIG, COUNT, LEARNING_RATE, MODEL, QUERY, ROUND, TRAIN
from fedlib.model import State

# --- secure aggregation

KEYS, MASKED, REVEAL = f"{QUERY}.keys", f"{TRAIN}.masked", f"{QUERY}.reveal"
KEY_BYTES = 32  # of an X25519 public key (RFC 7748), and of a seed
BITS, BOUND = {"range": (2, 32)}, {"range": (1e-9, 1e9)}


@dataclass(frozen=True)
class KeysRequest:
    """What a node is asked for: a public key for this round."""

    server_round: int = field(metadata=CONFIG | ROUND)


@dataclass(frozen=True)
class KeysReply:
    """Its answer: an X25519 public key, 32 bytes."""

    public_key: bytes = field(metadata=CONFIG)

    def __post_init__(self) -> None:
        _expect_keys("config: public-key", [self.public_key], 1)


@dataclass(frozen=True)
class MaskedRequest:
    """A node shall train, and answer with masked integers.

    ``bits``, ``bound`` and ``max_examples`` are those of a ``FixedPoint``.
    """

    model: State = field(metadata=MODEL)
    server_round: int = field(metadata=CONFIG | ROUND)
    dataset: str = field(metadata=CONFIG)
    learning_rate: float = field(metadata=CONFIG | LEARNING_RATE)
    node_ids: list = field(metadata=CONFIG)  # type: ignore[type-arg]  # of int: who takes part
    public_keys: list = field(metadata=CONFIG)  # type: ignore[type-arg]  # of bytes, as node_ids
    bits: int = field(metadata=CONFIG | BITS)
    bound: float = field(metadata=CONFIG | BOUND)
    max_examples: int = field(metadata=CONFIG | COUNT)

    def __post_init__(self) -> None:
        _expect_ids("config: node-ids", self.node_ids)
        _expect_keys("config: public-keys", self.public_keys, len(self.node_ids))

    @property
    def keys(self) -> dict[int, bytes]:
        """The public key of every participant, by its id."""
        return dict(zip(self.node_ids, self.public_keys, strict=True))


@dataclass(frozen=True)
class MaskedReply:
    """Its answer: one int32 tensor, ``integers``, of the update and the number of examples."""

    masked: State = field(metadata={"record": "masked", "kind": ArrayRecord})


@dataclass(frozen=True)
class RevealRequest:
    """A node is asked for the seeds that it shares with those who dropped out of this round."""

    server_round: int = field(metadata=CONFIG | ROUND)
    node_ids: list = field(metadata=CONFIG)  # type: ignore[type-arg]  # of int

    def __post_init__(self) -> None:
        _expect_ids("config: node-ids", self.node_ids)


@dataclass(frozen=True)
class RevealReply:
    """Its answer: a seed for each of them, 32 bytes, in the order of the ids."""

    node_ids: list = field(metadata=CONFIG)  # type: ignore[type-arg]  # of int
    seeds: list = field(metadata=CONFIG)  # type: ignore[type-arg]  # of bytes

    def __post_init__(self) -> None:
        _expect_ids("config: node-ids", self.node_ids)
        _expect_keys("config: seeds", self.seeds, len(self.node_ids))


def _expect_ids(name: str, ids: Collection[object]) -> None:
    if not ids or len(set(map(repr, ids))) < len(ids) or any(type(i) is not int for i in ids):
        raise ReplyError(f"{name}: expected different whole numbers, got {list(ids)}")


def _expect_keys(name: str, keys: Collection[object], number: int) -> None:
    lengths = [len(key) if isinstance(key, bytes) else type(key).__name__ for key in keys]
    if lengths != [KEY_BYTES] * number:
        raise ReplyError(f"{name}: expected {number} times {KEY_BYTES} bytes, got {lengths}")
