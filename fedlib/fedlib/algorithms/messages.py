"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.
"""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from fedlib.messages import CONFIG, COUNT, LOSS_SUM, METRICS, MODEL, TRAIN, TrainRequest
from fedlib.model import State
from fedlib.training import Weighted

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
class ScaffoldReply:
    """Its answer: a TrainReply's fields, and by how much the node's own control variate changed."""

    model: State = field(metadata=MODEL)
    num_examples: int = field(metadata=METRICS | COUNT)
    loss_sum: float = field(metadata=METRICS | LOSS_SUM)
    loss_weight: int = field(metadata=METRICS | COUNT)
    control: State = field(metadata=CONTROL)

    @property
    def loss(self) -> Weighted:
        """The training loss, summed over every example of every epoch."""
        return Weighted(self.loss_sum, self.loss_weight)
