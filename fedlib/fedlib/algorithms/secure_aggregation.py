"""Secure aggregation: the server learns the sum of the nodes' updates, and no single one.

A round has three stages: the nodes send public keys, then masked updates, and where some drop out,
the others reveal the seeds that they share with those. ``fedlib.algorithms.masks`` has the maths.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, https://eprint.iacr.org/2017/281, section 4.1.

What this leaves out of the paper: the second mask of each node and its shares (section 4.2), and
signed keys (section 6). So it protects from a server that is curious and honest. One that lies
about who dropped out can read replies, of nearly half of the nodes, and also long after the round,
as a node keeps its seeds until the next one. So can one that hands out keys of its own. And a node
that stays away when seeds are revealed costs the round.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlib import messages
from fedlib.algorithms import masks
from fedlib.algorithms.common import flatten, refuse
from fedlib.algorithms.masks import FEWEST, FixedPoint, Integers, Mask, pair_seeds, recover
from fedlib.algorithms.messages import (
    KEYS,
    KEYS_ACTION,
    MASKED,
    MASKED_ACTION,
    REVEAL,
    REVEAL_ACTION,
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    RevealReply,
    RevealRequest,
)
from fedlib.client_app import Node, answer, handle_train, make_client_app
from fedlib.config import Config
from fedlib.errors import ReplyError
from fedlib.nodes import Nodes
from fedlib.run_directory import Stage

Masked = Callable[..., RecordDict]
"""What ``handle_masked`` is: of a message, a node and ``mask``, the content of a reply."""

SECRET = "secure-aggregation"  # where a node's state keeps its private key, and then its seeds


# --- the node's side: thin handlers


def handle_keys(message: Message, node: Node) -> RecordDict:
    """Make a key pair for this round; keep the private half, and reply with the public one.

    It comes from the operating system's randomness: a key that follows from a seed is no secret.

    Raises:
        ReplyError: There was a key for this round, or a later one.
    """
    request = messages.decode(KeysRequest, message.content)
    known = node.state.config_records.get(SECRET)
    last: Any = -1 if known is None else known["round"]
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


def handle_masked(message: Message, node: Node, mask: Mask = masks.mask) -> RecordDict:
    """Train as ever, and reply with the update as integers under a mask: once a round.

    Raises:
        ReplyError: There was a mask in this round, or the participants' keys cannot be those of an
            honest round.
    """
    request, own_id = messages.decode(MaskedRequest, message.content), message.metadata.dst_node_id
    secret = _secret(node, request.server_round, "private-key")
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
    names: Any = secret["nodes"]
    values: Any = secret["seeds"]
    seeds: dict[int, bytes] = dict(zip(names, values, strict=True))
    if own_id in dropped:
        raise ReplyError(
            f"reveal: node {own_id} has not dropped out, and reveals nothing of itself"
        )
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


def make_masked_app(
    config: Config | None = None,
    mask: Mask = masks.mask,
    masked: Masked = handle_masked,
) -> ClientApp:
    """Return fedlib's ClientApp with the three handlers of secure aggregation.

    With a function in the place of ``handle_masked``, nodes answer ``train.masked`` differently.
    """
    app = make_client_app(config)
    app.query(KEYS_ACTION)(partial(answer, handle_keys, config=config))
    app.train(MASKED_ACTION)(partial(answer, partial(masked, mask=mask), config=config))
    app.query(REVEAL_ACTION)(partial(answer, handle_reveal, config=config))
    return app


def fewest_left(num_nodes: int) -> int:
    """Return how many participants must be left for a node to reveal seeds: more than half."""
    return max(FEWEST, num_nodes // 2 + 1)


def _secret(node: Node, server_round: int, key: str) -> ConfigRecord:
    secret = node.state.config_records.get(SECRET)
    if secret is None or secret["round"] != server_round or key not in secret:
        reasons = {
            "private-key": "there is no key, or it has made its mask; a mask serves once",
            "seeds": "there is no mask, or it was taken off",
        }
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
        nodes: The nodes.
        sampled: Who shall take part.
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
    for node_id, reason in unusable_keys(keys).items():  # one such key would cost all the round
        refuse(nodes, done.keys, node_id, reason)
        del keys[node_id]
    _expect_enough(len(keys), FEWEST, "keys", done.keys)

    order = replace(order, node_ids=list(keys), public_keys=list(keys.values()))
    length = sum(tensor.numel() for tensor in order.model.values()) + 1
    total, survivors, content = np.zeros(length, np.uint32), set[int](), messages.encode(order)
    for node_id, reply in ask(MASKED, keys, content, done.train, kind=MaskedReply):
        try:
            total += read_integers(reply, length)
            survivors.add(node_id)
        except ReplyError as error:
            refuse(nodes, done.train, node_id, error)
    done.dropped = [node_id for node_id in keys if node_id not in survivors]
    _expect_enough(len(survivors), fewest_left(len(keys)), "masked", done.train)

    if done.dropped and reveal:
        content = messages.encode(RevealRequest(server_round, done.dropped))
        replies = ask(REVEAL, sorted(survivors), content, done.reveal, kind=RevealReply)
        revealed = {i: dict(zip(r.node_ids, r.seeds, strict=True)) for i, r in replies}
        for node_id in [i for i, seeds in revealed.items() if set(seeds) != set(done.dropped)]:
            wrong = list(revealed.pop(node_id))
            came = f"expected the seeds of {done.dropped}, got those of {wrong}"
            refuse(nodes, done.reveal, node_id, came)
        _expect_enough(len(revealed), len(survivors), "reveal", done.reveal)
        total = recover(total, revealed)
    return total, done


def read_integers(reply: MaskedReply, length: int) -> Integers:
    """Return a reply's integers.

    Raises:
        ReplyError: They are not one int32 tensor of this length.
    """
    tensor = reply.masked.get("integers", torch.empty(0))
    if (
        set(reply.masked) != {"integers"}
        or tensor.dtype != torch.int32
        or tensor.shape != (length,)
    ):
        came = {name: (str(t.dtype), tuple(t.shape)) for name, t in reply.masked.items()}
        raise ReplyError(f"masked: expected {length} integers (int32), got {came}")
    return tensor.numpy().view(np.uint32)


def unusable_keys(keys: Mapping[int, bytes]) -> dict[int, str]:
    """Return who sent a public key that gives no secret, or that an earlier node has, and why."""
    seen, reasons, own = set[bytes](), dict[int, str](), X25519PrivateKey.generate()
    for node_id, key in keys.items():
        try:
            own.exchange(X25519PublicKey.from_public_bytes(key))
        except ValueError as error:
            reasons[node_id] = f"expected a usable public key, got {error}"
        if key in seen:
            reasons[node_id] = "expected a public key of its own, got that of another node"
        seen.add(key)
    return reasons


def _expect_enough(number: int, fewest: int, what: str, stage: Stage) -> None:
    if number < fewest:
        reasons = "; ".join(stage.problems[:1]) or "no reason"
        raise ReplyError(
            f"{what}: expected {fewest} or more answers, got {number}: the round is lost "
            f"({reasons})"
        )
