"""TRAIN with a small reply: the update, packed by ``fedlib.algorithms.compression``.

Only the reply is smaller: a node still receives the whole model. With error feedback a node keeps
what it left out in its ``Context.state`` until it trains again, which may be many rounds later; a
node that is replaced by a new one begins with nothing. What was sent is forgotten at once, also if
the reply is lost.
"""

import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedlib import messages
from fedlib.algorithms.common import sizes
from fedlib.algorithms.compression import Scheme, Vector, compress, flatten, pack
from fedlib.algorithms.local_training import prepare
from fedlib.algorithms.messages import CompressedReply, CompressedRequest
from fedlib.client_app import Node
from fedlib.errors import ReplyError
from fedlib.model import clone_state
from fedlib.randomness import numpy_generator

RESIDUAL = "residual"  # where a node's state holds what it has not sent yet
ROUNDING = 17  # of the generator that rounds: a stream of its own, beside those of fedlib.Stream


def rounding_generator(seed: int, server_round: int, partition_id: int) -> np.random.Generator:
    """Return the generator that rounds one node's update in one round."""
    return numpy_generator(seed, server_round, partition_id, ROUNDING)


def handle_compressed(message: Message, node: Node) -> RecordDict:
    """Train as TRAIN does; reply with the update, packed, and remember what was left out.

    Raises:
        ReplyError: The training diverged. The memory stays as it was.
    """
    request = messages.decode(CompressedRequest, message.content)
    scheme = Scheme(request.share, request.bits, request.feedback)
    training = prepare(request, node)
    loss = training.start()
    vector = flatten(clone_state(training.model)) - flatten(request.model)
    if not (np.isfinite(vector).all() and math.isfinite(loss.sum)):
        raise ReplyError("update: expected finite values, got NaN; lower the learning rate")
    if scheme.feedback:
        memory = read_residual(node.state, len(vector))
        indices, values, rest = compress(vector, memory, scheme.share)
        arrays = {"indices": indices, "values": values}
        node.state[RESIDUAL] = ArrayRecord({RESIDUAL: Array(rest)})
    else:
        rng = rounding_generator(node.config.seed, request.server_round, node.partition_id)
        arrays = pack(vector, scheme, sizes(request.model), rng)
    update = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return messages.encode(CompressedReply(update, training.num_examples, loss.sum, loss.weight))


def read_residual(state: RecordDict, number: int) -> Vector:
    """Return what a node remembers; zeros where it has never trained, or lost its state."""
    record: Any = state.get(RESIDUAL)
    kept: Vector = record[RESIDUAL].numpy() if record else np.zeros(number, dtype=np.float32)
    if len(kept) != number:
        raise ReplyError(f"residual: expected {number} values, got {len(kept)}; clear the state")
    return kept
