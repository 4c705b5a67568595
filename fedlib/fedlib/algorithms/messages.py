"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.

    TRAIN.private   PrivateRequest       reply: PrivateReply
"""

from dataclasses import dataclass, field

from fedlib.messages import CONFIG, MODEL, TRAIN, TrainRequest
from fedlib.model import State

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
