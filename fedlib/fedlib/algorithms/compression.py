"""Smaller updates: the largest tenth of the values, or all of them with few bits each.

A node sends what it changed, its model less the global model, as one vector in a packed form. The
server unpacks it and adds it to the global model, so that FedAvg goes on as it always does.

    top-k         the k values of the largest magnitude, with their places. With error feedback a
                  node keeps what it did not send, and adds it to its next update: Stich et al.,
                  arXiv:1809.07599, algorithm 1 (Mem-SGD); Karimireddy et al., arXiv:1901.09847,
                  algorithm 2 (EF-SGD).
    quantisation  each value is rounded to one of a few levels at random, so that it is right on
                  average: Alistarh et al., arXiv:1610.02132, section 3.1 (QSGD). The scale is the
                  largest magnitude of each tensor, as in Wen et al., arXiv:1705.07878 (TernGrad),
                  which is what two bits come to.

This module is maths on NumPy arrays; ``fedlib.algorithms.compressed_reply`` brings it to Flower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlib.algorithms import common
from fedlib.algorithms.common import sizes
from fedlib.errors import ReplyError
from fedlib.model import State

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Scheme:
    """How an update is made smaller: by a share of its values, or by the bits of each."""

    share: float = 1.0  # of the values that are sent; 1: all of them, with fewer bits
    bits: int = 32  # of each value; 32: as it is
    feedback: bool = False  # does the node remember what a share below 1 has left out?

    def __post_init__(self) -> None:
        fewer = 0 < self.share < 1 and self.bits == 32
        shorter = self.share == 1 and 2 <= self.bits <= 8 and not self.feedback
        if not (fewer or shorter):
            raise ReplyError(
                f"scheme: expected a share below 1 with 32 bits, or 2 to 8 bits with a share of 1 "
                f"and no feedback, got {self}"
            )


def flatten(state: State) -> Vector:
    """Return a state of float32 tensors as one vector, in the alphabetical order of their names."""
    return common.flatten(state).astype(np.float32)


def top_k(vector: Vector, share: float) -> tuple[NDArray[np.int32], Vector]:
    """Return the places (int32, ascending) and values of the largest magnitudes, at least one.

    Their number is ``round(share * len(vector))``. Of two that are equal, the earlier one counts.
    """
    k = max(1, round(share * len(vector)))
    largest = np.argsort(-np.abs(vector), kind="stable")[:k]
    indices = np.sort(largest).astype(np.int32)
    return indices, vector[indices]


def compress(update: Vector, memory: Vector, share: float) -> tuple[Any, Vector, Vector]:
    """Return the places and values that are sent, and the new memory: error feedback.

    With a = update + memory, what is sent and the new memory add up to a, exactly: a value is in
    one or in the other (Karimireddy et al., algorithm 2, lines 4 to 7).
    """
    wanted = update + memory
    indices, values = top_k(wanted, share)
    wanted[indices] = 0
    return indices, values, wanted


def quantise(
    vector: Vector, tensor_sizes: Sequence[int], bits: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], Vector]:
    """Round each value, at random, to one of the 2^bits - 1 levels of its tensor.

    The levels are -s to s times scale / s, where s = 2^(bits - 1) - 1 and the scale is the largest
    magnitude in the tensor. A value between two levels goes up with the probability of how far it
    is from the lower one, so its expectation is the value itself (QSGD, section 3.1).

    Returns:
        The numbers of the levels, 0 to 2 s, (N,); and the scales, float32, one a tensor.
    """
    steps = 2 ** (bits - 1) - 1
    tensors = np.split(vector, np.cumsum(tensor_sizes)[:-1])
    scales = np.array([np.abs(t).max(initial=0) for t in tensors], dtype=np.float32)
    whole = np.repeat(np.where(scales == 0, 1, scales), tensor_sizes).astype(np.float64)
    exact = vector / whole * steps
    lower = np.floor(exact)
    level = lower + (rng.random(len(vector)) < exact - lower)
    return (level + steps).astype(np.uint8), scales


def dequantise(
    codes: NDArray[np.uint8], scales: Vector, tensor_sizes: Sequence[int], bits: int
) -> Vector:
    """Return the values of the levels, float32, (N,)."""
    steps = 2 ** (bits - 1) - 1
    whole = np.repeat(scales.astype(np.float64), tensor_sizes)
    values: Vector = ((codes.astype(np.float64) - steps) * whole / steps).astype(np.float32)
    return values


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Keep the last ``bits`` bits of each code, one behind the other: ceil(N bits / 8) bytes."""
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, -bits:])


def unpack_bits(packed: NDArray[np.uint8], number: int, bits: int) -> NDArray[np.uint8]:
    """Return the codes that ``pack_bits`` put together."""
    rows = np.unpackbits(packed, count=number * bits).reshape(number, bits)
    padded = np.pad(rows, ((0, 0), (8 - bits, 0)))
    return np.packbits(padded, axis=1)[:, 0]


def unpack(update: State, scheme: Scheme, model: State) -> Vector:
    """Return the vector in a reply's arrays; the places that were not sent are 0.

    Raises:
        ReplyError: An array is missing, has another dtype or length, names a place that is not in
            the model or one twice, holds a level that does not exist, or is not finite. Such a
            reply is refused as a whole.
    """
    number = sum(sizes(model))
    if scheme.share < 1:
        k = max(1, round(scheme.share * number))
        arrays = _expect(update, {"indices": (np.int32, k), "values": (np.float32, k)})
        indices, values = arrays["indices"], arrays["values"]
        if not 0 <= indices.min() <= indices.max() < number:
            came = f"{indices.min()} to {indices.max()}"
            raise ReplyError(f"update: indices: expected 0 to {number - 1}, got {came}")
        if len(np.unique(indices)) < k:
            raise ReplyError(f"update: indices: expected {k} different ones, got one twice")
        vector: Vector = np.zeros(number, dtype=np.float32)
        vector[indices] = _finite("values", values)
        return vector
    num_bytes = -(-number * scheme.bits // 8)
    num_tensors = len(sizes(model))
    arrays = _expect(update, {"codes": (np.uint8, num_bytes), "scales": (np.float32, num_tensors)})
    scales = _finite("scales", arrays["scales"])
    codes, highest = unpack_bits(arrays["codes"], number, scheme.bits), 2**scheme.bits - 2
    if scales.min() < 0 or codes.max() > highest:
        came = f"{scales.min()} and {codes.max()}"
        raise ReplyError(f"update: expected scales from 0, codes to {highest}, got {came}")
    return dequantise(codes, scales, sizes(model), scheme.bits)


def pack(
    vector: Vector, scheme: Scheme, tensor_sizes: Sequence[int], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return an update as the arrays that travel."""
    if scheme.share < 1:
        indices, values = top_k(vector, scheme.share)
        return {"indices": indices, "values": values}
    codes, scales = quantise(vector, tensor_sizes, scheme.bits, rng)
    return {"codes": pack_bits(codes, scheme.bits), "scales": scales}


def _expect(update: State, wanted: Mapping[str, tuple[Any, int]]) -> dict[str, NDArray[Any]]:
    if set(update) != set(wanted):
        right, came = (", ".join(sorted(names)) or "nothing" for names in (wanted, update))
        raise ReplyError(f"update: expected the arrays {right}, got {came}")
    arrays = {name: tensor.numpy() for name, tensor in update.items()}
    for name, (dtype, length) in wanted.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != (length,):
            expected = f"{length} of {np.dtype(dtype)}"
            came = f"shape {array.shape} of {array.dtype}"
            raise ReplyError(f"update: {name}: expected {expected}, got {came}")
    return arrays


def _finite(name: str, values: Vector) -> Vector:
    if not np.isfinite(values).all():
        raise ReplyError(f"update: {name}: expected finite values, got NaN or infinite ones")
    return values
