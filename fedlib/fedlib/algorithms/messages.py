"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.

    notebook 13   train.proximal     ProximalRequest    reply: TrainReply
                  train.scaffold     ScaffoldRequest    reply: ScaffoldReply
    notebook 15   query.keys         KeysRequest        reply: KeysReply
                  train.masked       MaskedRequest      reply: MaskedReply
                  query.reveal       RevealRequest      reply: RevealReply
    notebook 16   train.private      PrivateRequest     reply: PrivateReply
    notebook 17   train.compressed   CompressedRequest  reply: CompressedReply
                  train.personal     TrainRequest       reply: TrainReply     without the last layer
                  evaluate.personal  EvaluateRequest    reply: EvaluateReply  likewise
                  evaluate.tuned     TrainRequest       reply: EvaluateReply

Notebook 14 needs none: what its server must know of a message, it remembers.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from fedlib.errors import ReplyError
from fedlib.messages import (
    CONFIG,
    COUNT,
    EVALUATE,
    LOSS_SUM,
    METRICS,
    MODEL,
    QUERY,
    ROUND,
    TRAIN,
    TrainReply,
    TrainRequest,
)
from fedlib.model import State

# --- notebook 13: FedProx and SCAFFOLD

PROXIMAL_ACTION, SCAFFOLD_ACTION = "proximal", "scaffold"
PROXIMAL, SCAFFOLD = f"{TRAIN}.{PROXIMAL_ACTION}", f"{TRAIN}.{SCAFFOLD_ACTION}"
PROXIMAL_MU = {"range": (0.0, 1e3)}
CONTROL = {"record": "control", "kind": ArrayRecord}
OWN_CONTROL = "own-control"  # the record of a node's state in which it keeps its control variate


@dataclass(frozen=True)
class ProximalRequest(TrainRequest):
    """TRAIN, and how strongly a node is pulled back to the model; the reply is a TrainReply."""

    proximal_mu: float = field(metadata=CONFIG | PROXIMAL_MU)


@dataclass(frozen=True)
class ScaffoldRequest(TrainRequest):
    """TRAIN, and the server's control variate: a tensor for each of the model's parameters."""

    control: State = field(metadata=CONTROL)


@dataclass(frozen=True)
class ScaffoldReply(TrainReply):
    """Its answer: a TrainReply's fields, and by how much the node's own control variate changed."""

    control: State = field(metadata=CONTROL)


# --- notebook 15: secure aggregation

KEYS_ACTION, MASKED_ACTION, REVEAL_ACTION = "keys", "masked", "reveal"
KEYS, REVEAL = f"{QUERY}.{KEYS_ACTION}", f"{QUERY}.{REVEAL_ACTION}"
MASKED = f"{TRAIN}.{MASKED_ACTION}"
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
class MaskedRequest(TrainRequest):
    """A node shall train, and answer with masked integers.

    ``bits``, ``bound`` and ``max_examples`` are those of a ``FixedPoint``.
    """

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


# --- notebook 16: private replies

PRIVATE_ACTION = "private"
TRAIN_PRIVATE = f"{TRAIN}.{PRIVATE_ACTION}"
CLIP, NOISE = {"range": (1e-9, 1e9)}, {"range": (0.0, 1e6)}


@dataclass(frozen=True)
class PrivateRequest(TrainRequest):
    """What a node is told when it shall train, clip its update, and perhaps add noise to it."""

    clip: float = field(metadata=CONFIG | CLIP)  # the largest L2 norm of an update
    noise_multiplier: float = field(metadata=CONFIG | NOISE)  # of the reply's noise, in clips


@dataclass(frozen=True)
class PrivateReply:
    """Its answer: the global model plus its update, clipped and noised, and nothing else.

    A number of examples or a loss would tell something that neither clip nor noise covers.
    """

    model: State = field(metadata=MODEL)


# --- notebook 17: small updates and personal heads

COMPRESSED_ACTION, PERSONAL_ACTION, TUNED_ACTION = "compressed", "personal", "tuned"
COMPRESSED, PERSONAL = f"{TRAIN}.{COMPRESSED_ACTION}", f"{TRAIN}.{PERSONAL_ACTION}"
EVALUATE_PERSONAL, EVALUATE_TUNED = f"{EVALUATE}.{PERSONAL_ACTION}", f"{EVALUATE}.{TUNED_ACTION}"
UPDATE = {"record": "update", "kind": ArrayRecord}


@dataclass(frozen=True)
class CompressedRequest(TrainRequest):
    """What a node is told when it shall train and send little (see ``compression.Scheme``)."""

    share: float = field(metadata=CONFIG | {"range": (0.0, 1.0)})
    bits: int = field(metadata=CONFIG | {"range": (2, 32)})
    feedback: bool = field(metadata=CONFIG)


@dataclass(frozen=True)
class CompressedReply:
    """Its answer: the update as packed arrays, by the names that ``compression.unpack`` reads."""

    update: State = field(metadata=UPDATE)
    num_examples: int = field(metadata=METRICS | COUNT)
    loss_sum: float = field(metadata=METRICS | LOSS_SUM)
    loss_weight: int = field(metadata=METRICS | COUNT)
