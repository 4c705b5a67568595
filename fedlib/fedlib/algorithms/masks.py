"""Masks that cancel: the maths of secure aggregation, without Flower.

Each pair of nodes agrees on a seed. The one adds the numbers that follow from it, the other
subtracts them, so they cancel in the sum over all nodes. This is exact, because updates become
whole numbers first, and all sums are modulo 2**32.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, https://eprint.iacr.org/2017/281, section 4.1 (masks with one-time pads).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedlib.errors import ConfigError, ReplyError

Integers = NDArray[np.uint32]  # (P + 1,): of P parameters, and the number of examples; mod 2**32
Mask = Callable[[int, Mapping[int, bytes], int], Integers]
SEED_BYTES = 32
FEWEST = 3  # participants: of two, each would learn the other's update from the sum


# --- fixed-point numbers


@dataclass(frozen=True)
class FixedPoint:
    """How an update becomes integers whose sum over all nodes fits into ``bits`` bits.

    A value is clipped to [-bound, bound], and a node's weight to ``max_examples``. Their product is
    at most ``levels`` after scaling, so the sum over ``num_nodes`` is at most 2**(bits - 1) - 1.

    Raises:
        ConfigError: There is no such number.
    """

    bits: int
    bound: float  # of one parameter's change in one round, in its own unit
    max_examples: int
    num_nodes: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or not 2 <= self.bits <= 32 or self.levels < 1:
            raise ConfigError(
                f"fixed point: expected 2 to 32 bits, enough for a sum over {self.num_nodes} nodes,"
                f" got {self.bits}; take more bits, or fewer nodes"
            )
        if not 0 < self.bound < float("inf") or not 0 < self.max_examples * self.num_nodes < 2**31:
            raise ConfigError(
                f"fixed point: expected a bound above 0 and a number of examples whose sum is below"
                f" 2**31, got {self.bound} and {self.num_nodes} times {self.max_examples}"
            )

    @property
    def levels(self) -> int:
        """The largest integer of one node."""
        return int(2 ** (self.bits - 1) - 1) // self.num_nodes

    @property
    def scale(self) -> float:
        """Integer steps for a change of 1 over one example."""
        return self.levels / (self.bound * self.max_examples)

    def encode(self, update: NDArray[np.float64], num_examples: int) -> Integers:
        """Return the weighted update (P,) as integers, and the weight as the last of them.

        Raises:
            ReplyError: A value is not finite.
        """
        if not np.isfinite(update).all():
            raise ReplyError("secure aggregation: expected a finite update, got NaN or infinity")
        weight = min(num_examples, self.max_examples)
        clipped = np.clip(update, -self.bound, self.bound)
        rounded = np.rint(self.scale * weight * clipped).astype(np.int64)
        return np.append(rounded, weight).astype(np.uint32)  # modulo 2**32

    def decode(self, total: Integers) -> tuple[NDArray[np.float64], int]:
        """Return the mean update (P,) and the number of examples, from the sum over the nodes.

        Raises:
            ReplyError: The number of examples is impossible, so masks are left in the sum.
        """
        signed = total.view(np.int32)
        num_examples, most = int(signed[-1]), self.num_nodes * self.max_examples
        if not 1 <= num_examples <= most:
            raise ReplyError(
                f"secure aggregation: expected 1 to {most} examples in the sum, got {num_examples};"
                f" masks are left in it"
            )
        return signed[:-1] / (self.scale * num_examples), num_examples


# --- masks


def pair_seed(
    private_key: bytes, public_key: bytes, server_round: int, one: int, other: int
) -> bytes:
    """Return the seed, 32 bytes, that two nodes share in a round; both compute the same.

    X25519 (RFC 7748) gives a secret, HKDF (RFC 5869) a key that serves this round and pair alone.

    Raises:
        ReplyError: The public key is one that makes no secret.
    """
    info = f"fedlib masks, round {server_round}, nodes {min(one, other)} and {max(one, other)}"
    try:
        public = X25519PublicKey.from_public_bytes(public_key)
        secret = X25519PrivateKey.from_private_bytes(private_key).exchange(public)
    except ValueError as error:
        raise ReplyError(f"node {other}: expected a usable public key, got {error}") from error
    return HKDF(SHA256(), SEED_BYTES, salt=None, info=info.encode()).derive(secret)


def pair_seeds(
    own_id: int, private_key: bytes, keys: Mapping[int, bytes], server_round: int
) -> dict[int, bytes]:
    """Return the seed for each other participant, after a look at all the keys.

    Raises:
        ReplyError: There are too few participants, the own key is not the one that was sent, or a
            key serves two nodes.
    """
    if len(keys) < FEWEST:
        raise ReplyError(f"masked: expected {FEWEST} nodes or more, got {len(keys)}")
    own = X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    if keys.get(own_id) != own:
        came = "another" if own_id in keys else "none"
        raise ReplyError(f"masked: node {own_id}: expected the public key that it sent, got {came}")
    if len(set(keys.values())) < len(keys):
        owners = {key: sorted(i for i in keys if keys[i] == key) for key in keys.values()}
        twice = next(ids for ids in owners.values() if len(ids) > 1)
        raise ReplyError(f"masked: expected a public key for each node, got one for nodes {twice}")
    others = (i for i in keys if i != own_id)
    return {i: pair_seed(private_key, keys[i], server_round, own_id, i) for i in others}


def keystream(seed: bytes, length: int) -> Integers:
    """Return ``length`` numbers that nobody can guess who lacks the seed, by ChaCha20.

    The nonce may be zero, since each seed serves for one stream.
    """
    cipher = Cipher(ChaCha20(seed, nonce=bytes(16)), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(4 * length)), "<u4").astype(np.uint32)


def mask(own_id: int, seeds: Mapping[int, bytes], length: int) -> Integers:
    """Return what a node adds to its integers: for each other node, the stream of their seed.

    The node with the lower id adds it, the other subtracts it, modulo 2**32.
    """
    total = np.zeros(length, np.uint32)
    for other, seed in seeds.items():
        stream = keystream(seed, length)
        total = total + stream if own_id < other else total - stream
    return total


def recover(
    total: Integers, revealed: Mapping[int, Mapping[int, bytes]], mask: Mask = mask
) -> Integers:
    """Take out of the survivors' sum the masks that they share with those who dropped out.

    Args:
        total: The sum of the survivors' masked integers.
        revealed: By each survivor's id: the seeds that it shares with those who dropped out.
        mask: How a node computes a mask from seeds.
    """
    for survivor, seeds in revealed.items():
        total = total - mask(survivor, seeds, len(total))
    return total
