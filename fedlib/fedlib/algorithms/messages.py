"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.

    train.compressed   CompressedRequest  reply: CompressedReply
    train.personal     TrainRequest       reply: TrainReply       the model lacks its last layer
    evaluate.personal  EvaluateRequest    reply: EvaluateReply    as well
    evaluate.tuned     TrainRequest       reply: EvaluateReply
"""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from fedlib.messages import CONFIG, COUNT, LOSS_SUM, METRICS, TrainRequest
from fedlib.model import State

COMPRESSED_ACTION, PERSONAL_ACTION, TUNED_ACTION = "compressed", "personal", "tuned"
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
