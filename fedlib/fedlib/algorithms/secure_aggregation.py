"""Secure aggregation: the server learns the sum of the nodes' updates, and no single one.

Each pair of nodes agrees on a seed. The one adds the numbers that follow from it, the other
subtracts them, so they cancel in the sum over all. Where a node drops out, the others reveal the
seeds that they share with it.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, https://eprint.iacr.org/2017/281, section 4.1 (masks with one-time pads).

What this leaves out of the paper: the second mask of each node and its shares (section 4.2), and
signed keys (section 6). So it protects from a server that is curious and honest. One that lies
about who dropped out, or hands out keys of its own, can read a reply; and a node that stays away
when seeds are revealed costs the round.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

from fedlib import messages
from fedlib.algorithms.messages import (
    KEY_BYTES,
    KEYS,
    MASKED,
    REVEAL,
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    RevealReply,
    RevealRequest,
)
from fedlib.client_app import Node, answer, handle_train, make_client_app
from fedlib.config import Config
from fedlib.errors import ConfigError, ReplyError
from fedlib.model import State
from fedlib.nodes import Nodes
from fedlib.run_directory import Stage

Integers = NDArray[np.uint32]  # (P + 1,): of P parameters, and the number of examples; mod 2**32
Mask = Callable[[int, Mapping[int, bytes], int], Integers]
FEWEST = 3  # participants: of two, each would learn the other's update from the sum
SECRET = "secure-aggregation"  # where a node's state keeps its private key  # noqa: S105


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
        if not 2 <= self.bits <= 32 or self.levels < 1:
            raise ConfigError(
                f"fixed point: expected 2 to 32 bits, enough for a sum over {self.num_nodes} nodes,"
                f" got {self.bits}; take more bits, or fewer nodes"
            )
        if not self.bound > 0 or not 0 < self.max_examples * self.num_nodes < 2**31:
            raise ConfigError(
                f"fixed point: expected a bound above 0 and a number of examples whose sum is below"
                f" 2**31, got {self.bound} and {self.num_nodes} times {self.max_examples}"
            )

    @property
    def levels(self) -> int:
        """The largest integer of one node."""
        return (2 ** (self.bits - 1) - 1) // self.num_nodes

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


def flatten(state: State) -> NDArray[np.float64]:
    """Return all values of a state, (P,), in the order of the names.

    Raises:
        ConfigError: A tensor is not of real numbers with a point.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"secure aggregation: {name}: expected floats, got {tensor.dtype}")
    return np.concatenate([state[n].detach().cpu().double().numpy().ravel() for n in sorted(state)])


def moved(state: State, update: NDArray[np.float64]) -> dict[str, Tensor]:
    """Return the state plus an update (P,), in the state's dtypes and order."""
    sizes = [state[name].numel() for name in sorted(state)]
    parts = np.split(flatten(state) + update, np.cumsum(sizes)[:-1])
    new = dict(zip(sorted(state), parts, strict=True))
    return {n: torch.from_numpy(new[n]).reshape(t.shape).to(t.dtype) for n, t in state.items()}


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
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info.encode()).derive(secret)


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


# --- the node's side: thin handlers


def make_masked_app(config: Config | None = None, mask: Mask = mask) -> ClientApp:
    """Return fedlib's ClientApp with the three handlers of secure aggregation."""
    app = make_client_app(config)
    app.query("keys")(partial(answer, handle_keys, config=config))
    app.train("masked")(partial(answer, partial(handle_masked, mask=mask), config=config))
    app.query("reveal")(partial(answer, handle_reveal, config=config))
    return app


def handle_keys(message: Message, node: Node) -> RecordDict:
    """Make a key pair for this round; keep the private half, and reply with the public one.

    It comes from the operating system's randomness: a key that follows from a seed is no secret.

    Raises:
        ReplyError: There was a key for this round, or a later one.
    """
    request = messages.decode(KeysRequest, message.content)
    last = int(node.state.config_records.get(SECRET, ConfigRecord({"round": -1}))["round"])  # type: ignore[arg-type]
    if request.server_round <= last:
        raise ReplyError(
            f"keys: expected a round after {last}, got {request.server_round}; "
            f"a round has one key pair"
        )
    key = X25519PrivateKey.generate()
    node.state[SECRET] = ConfigRecord(
        {"round": request.server_round, "private-key": key.private_bytes_raw()}
    )
    return messages.encode(KeysReply(key.public_key().public_bytes_raw()))


def handle_masked(message: Message, node: Node, mask: Mask = mask) -> RecordDict:
    """Train as ever, and reply with the update as integers under a mask: once a round.

    Raises:
        ReplyError: The participants' keys cannot be those of an honest round.
    """
    request, own_id = messages.decode(MaskedRequest, message.content), message.metadata.dst_node_id
    secret = _secret(node, request.server_round, "private-key")
    if "seeds" in secret:
        raise ReplyError(f"masked: round {request.server_round} was answered; a mask serves once")
    private_key: Any = secret["private-key"]
    seeds = pair_seeds(own_id, private_key, request.keys, request.server_round)
    point = FixedPoint(request.bits, request.bound, request.max_examples, len(seeds) + 1)
    plain = messages.TrainRequest(
        request.model, request.server_round, request.dataset, request.learning_rate
    )
    content = handle_train(Message(messages.encode(plain), reply_to=message), node)
    reply = messages.decode(messages.TrainReply, content)
    integers = point.encode(flatten(reply.model) - flatten(request.model), reply.num_examples)
    integers = integers + mask(own_id, seeds, len(integers))
    del secret["private-key"]  # the seeds are what may still be needed
    secret["nodes"], secret["seeds"] = list(seeds), list(seeds.values())
    return messages.encode(MaskedReply({"integers": torch.from_numpy(integers.view(np.int32))}))


def handle_reveal(message: Message, node: Node) -> RecordDict:
    """Reveal the seeds shared with those who dropped out: once a round, if most are still there.

    Raises:
        ReplyError: This would reveal more than the sum.
    """
    request, own_id = messages.decode(RevealRequest, message.content), message.metadata.dst_node_id
    secret, dropped = _secret(node, request.server_round, "seeds"), request.node_ids
    names, values = secret["nodes"], secret["seeds"]
    seeds: dict[int, bytes] = dict(zip(names, values, strict=True))  # type: ignore[arg-type]
    if own_id in dropped:
        raise ReplyError(f"reveal: node {own_id} has not dropped out, and reveals nothing of itself")
    if strangers := sorted(set(dropped) - seeds.keys()):
        raise ReplyError(f"reveal: expected nodes of the round, got {strangers}")
    num_left = len(seeds) + 1 - len(dropped)
    if num_left < fewest_left(len(seeds) + 1):
        raise ReplyError(
            f"reveal: expected {fewest_left(len(seeds) + 1)} or more of {len(seeds) + 1} nodes to "
            f"be left, got {num_left}"
        )
    del secret["nodes"], secret["seeds"]
    return messages.encode(RevealReply(dropped, [seeds[i] for i in dropped]))


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


def fewest_left(num_nodes: int) -> int:
    """Return how many participants must be left for a node to reveal seeds: more than half."""
    return max(FEWEST, num_nodes // 2 + 1)


def _secret(node: Node, server_round: int, key: str) -> ConfigRecord:
    secret = node.state.config_records.get(SECRET)
    if secret is None or secret["round"] != server_round or key not in secret:
        reasons = {"private-key": "no key was made or it was used", "seeds": "no mask to take off"}
        raise ReplyError(f"round {server_round}: {reasons[key]}")
    return secret


# --- the server's side


@dataclass
class MaskedRound:
    """What came of the three stages of a round."""

    keys: Stage = field(default_factory=Stage)
    train: Stage = field(default_factory=Stage)
    reveal: Stage = field(default_factory=Stage)
    dropped: list[int] = field(default_factory=list)  # who gave a key, and no usable reply


def masked_round(
    nodes: Nodes,
    sampled: Collection[int],
    order: MaskedRequest,
    timeout_s: float,
    reveal: bool = True,
) -> tuple[Integers, MaskedRound]:
    """Run a round; return the sum of the nodes' integers, as far as it can be unmasked.

    Args:
        nodes: The nodes, of whom ``sampled`` shall take part.
        order: What they shall do; who takes part and their keys are filled in here.
        timeout_s: For each of the three stages.
        reveal: Ask for the seeds of those who dropped out? If not, the sum is noise.

    Raises:
        ReplyError: Too few nodes gave a key or answered, or one kept its seeds for itself: the
            round is lost.
    """
    done, server_round = MaskedRound(), order.server_round
    ask = partial(nodes.ask, timeout_s=timeout_s)
    content = messages.encode(KeysRequest(server_round))
    replies = ask(KEYS, sampled, content, done.keys, kind=KeysReply)
    keys = {node_id: reply.public_key for node_id, reply in replies}
    keys = {node_id: keys[node_id] for node_id in sampled if node_id in keys}
    _expect_enough(len(keys), FEWEST, "keys", done.keys)

    order = replace(order, node_ids=list(keys), public_keys=list(keys.values()))
    length = sum(tensor.numel() for tensor in order.model.values()) + 1
    total, survivors, content = np.zeros(length, np.uint32), set[int](), messages.encode(order)
    for node_id, reply in ask(MASKED, keys, content, done.train, kind=MaskedReply):
        try:
            total += read_integers(reply, length)
            survivors.add(node_id)
        except ReplyError as error:
            done.train.problems.append(f"{nodes.name(node_id)}: {error}")
    done.dropped = [node_id for node_id in keys if node_id not in survivors]
    _expect_enough(len(survivors), fewest_left(len(keys)), "masked", done.train)

    if done.dropped and reveal:
        content = messages.encode(RevealRequest(server_round, done.dropped))
        replies = ask(REVEAL, sorted(survivors), content, done.reveal, kind=RevealReply)
        revealed = {i: dict(zip(r.node_ids, r.seeds, strict=True)) for i, r in replies}
        revealed = {i: seeds for i, seeds in revealed.items() if set(seeds) == set(done.dropped)}
        _expect_enough(len(revealed), len(survivors), "reveal", done.reveal)
        total = recover(total, revealed)
    return total, done


def read_integers(reply: MaskedReply, length: int) -> Integers:
    """Return a reply's integers.

    Raises:
        ReplyError: They are not one int32 tensor of this length.
    """
    tensor = reply.masked.get("integers", torch.empty(0))
    if set(reply.masked) != {"integers"} or tensor.dtype != torch.int32 or tensor.shape != (length,):
        came = {name: (str(t.dtype), tuple(t.shape)) for name, t in reply.masked.items()}
        raise ReplyError(f"masked: expected {length} integers (int32), got {came}")
    return tensor.numpy().view(np.uint32)


def _expect_enough(number: int, fewest: int, what: str, stage: Stage) -> None:
    if number < fewest:
        reasons = "; ".join(stage.problems[:1]) or "no reason"
        raise ReplyError(
            f"{what}: expected {fewest} or more answers, got {number}: the round is lost ({reasons})"
        )
