"""Lab 15: what masks cost, how many bits they need, and what a node that drops out does to them."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from course.labs import SEEDS, accuracy, first_model, lab_config, run_all
from fedlib import (
    Config,
    FedAvg,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    State,
    open_dataset,
    state_hash,
)
from fedlib.algorithms.common import moved
from fedlib.algorithms.masks import FixedPoint, Integers, Mask, keystream, mask, pair_seeds
from fedlib.algorithms.messages import MaskedReply, MaskedRequest
from fedlib.algorithms.secure_aggregation import (
    SECRET,
    Masked,
    MaskedRound,
    handle_masked,
    make_masked_app,
    masked_round,
)
from fedlib.client_app import Node
from fedlib.messages import TRAIN, TrainRequest, decode, encode
from fedlib.nodes import sample
from fedlib.training import single_thread

NUM_NODES, ROUNDS, TIMEOUT_S = 50, 8, 60.0
BITS, MOST_BITS = (8, 10, 12, 16, 24), 24
BOUND, MAX_EXAMPLES, TYPICAL_EXAMPLES = 0.25, 1000, 250
PARTICIPANTS = (5, 10, 20, 40)
NO_KEYS = {"node_ids": [0], "public_keys": [bytes(32)]}  # until nodes have sent theirs


@dataclass(frozen=True)
class Case:
    """One run.

    ``arm`` is "float" (plain FedAvg), "masked", "left out" (plain FedAvg without one node a round),
    "lost" and "recovered" (that node drops out after it gave its key; its seeds stay hidden, or
    are revealed), or "liar" (that node sends numbers of its own, in the range that is allowed).
    """

    arm: str
    seed: int
    bits: int = MOST_BITS


def configured(seed: int, num_sampled: int = 10) -> Config:
    """Return the config of a run in which so many of the fifty nodes take part in a round."""
    share = num_sampled / NUM_NODES
    return lab_config(seed, num_server_rounds=ROUNDS, fraction_clients_train=share)


def point_for(num_nodes: int, bits: int = MOST_BITS) -> FixedPoint:
    """Return the lab's fixed-point numbers for so many nodes."""
    return FixedPoint(bits, BOUND, MAX_EXAMPLES, num_nodes)


def order_for(config: Config, state: State, server_round: int, bits: int) -> MaskedRequest:
    """Return what the nodes are told, still without keys."""
    rate = config.learning_rate_at(server_round)
    common = {"bits": bits, "bound": BOUND, "max_examples": MAX_EXAMPLES}
    return MaskedRequest(state, server_round, config.dataset, rate, **NO_KEYS, **common)  # type: ignore[arg-type]


def whose_turn(sampled: list[int], server_round: int) -> int:
    """Return the node that drops out, or lies, in a round."""
    return sampled[server_round % len(sampled)]


def make_app(config: Config, arm: str) -> ClientApp:
    """Return the nodes' app; of "lost", "recovered" and "liar", with one bad node a round."""
    bad: Masked | None = {"lost": leave, "recovered": leave, "liar": lie}.get(arm)
    masked = partial(handle_badly, bad=bad) if bad else handle_masked
    return make_masked_app(config, masked=masked)


def handle_badly(message: Message, node: Node, mask: Mask, bad: Masked) -> RecordDict:
    """Answer as a node does, or badly where it is this node's turn."""
    request = decode(MaskedRequest, message.content)
    its_turn = whose_turn(request.node_ids, request.server_round) == message.metadata.dst_node_id
    return (bad if its_turn else handle_masked)(message, node, mask)


def leave(message: Message, node: Node, mask: Mask) -> RecordDict:
    """Drop out after the keys were handed out."""
    raise ReplyError("the battery is empty")


def lie(message: Message, node: Node, mask: Mask) -> RecordDict:
    """Send the largest numbers allowed, with signs by chance, under the right mask."""
    request, own_id = decode(MaskedRequest, message.content), message.metadata.dst_node_id
    point = point_for(len(request.node_ids), request.bits)
    num_parameters = sum(tensor.numel() for tensor in request.model.values())
    coins = keystream(request.server_round.to_bytes(32, "little"), num_parameters) % 2
    lies = point.encode(np.where(coins, BOUND, -BOUND), MAX_EXAMPLES)
    private_key: Any = node.state.config_records[SECRET]["private-key"]
    seeds = pair_seeds(own_id, private_key, request.keys, request.server_round)
    masked = lies + mask(own_id, seeds, len(lies))
    return encode(MaskedReply({"integers": torch.from_numpy(masked.view(np.int32))}))


# --- one round, and one run


def next_model(state: State, total: Integers, num_sampled: int, bits: int = MOST_BITS) -> State:
    """Return the model plus the mean update that a sum of integers stands for."""
    update, _ = point_for(num_sampled, bits).decode(total)
    return moved(state, update)


def float_round(
    nodes: Nodes, sampled: list[int], config: Config, state: State, server_round: int
) -> tuple[State, float]:
    """Run a round of plain FedAvg; return the next model and the largest change of a number."""
    rate = config.learning_rate_at(server_round)
    request = TrainRequest(state, server_round, config.dataset, rate)
    fedavg, stage, largest = FedAvg(state), Stage(), 0.0
    for _, reply in nodes.ask(TRAIN, sampled, encode(request), stage, TIMEOUT_S):
        fedavg.add(reply.model, reply.num_examples)
        changes = (float((reply.model[n] - state[n]).abs().max()) for n in state)
        largest = max(largest, *changes)
    return fedavg.result(), largest


def run(case: Case, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run the rounds, or the first of them; return each accuracy (percent), and the last hash."""
    config = configured(case.seed)
    dataset, state = open_dataset(config.dataset), first_model(config)
    nodes = Nodes(LocalGrid(make_app(config, case.arm), NUM_NODES))
    online = nodes.roll_call(TIMEOUT_S)
    accuracies, largest, lost = list[float](), 0.0, 0
    for server_round in range(1, rounds + 1):
        sampled = sample(online, config, server_round)
        absent = whose_turn(sampled, server_round)
        if case.arm in ("float", "left out"):
            left = [i for i in sampled if i != absent or case.arm == "float"]
            state, change = float_round(nodes, left, config, state, server_round)
            largest = max(largest, change)
        else:
            order = order_for(config, state, server_round, case.bits)
            try:
                ask_for_seeds = case.arm != "lost"
                total, done = masked_round(nodes, sampled, order, TIMEOUT_S, ask_for_seeds)
                if not ask_for_seeds:  # the sum does not say how many, so the server guesses
                    total[-1] = TYPICAL_EXAMPLES * (len(sampled) - len(done.dropped))
                state = next_model(state, total, len(sampled), case.bits)
            except ReplyError:
                lost += 1  # the model stays as it is
        accuracies.append(round(accuracy(state, dataset), 2))
    found = {"accuracies": accuracies, "sha256": state_hash(state)[:12], "rounds_lost": lost}
    return asdict(case) | found | ({"largest": round(largest, 3)} if largest else {})


# --- what a round costs


def cost(num_sampled: int) -> dict[str, Any]:
    """Measure a plain round, a masked one, and what one dropout adds, by bytes and by seconds.

    Bytes are the same each time. Seconds are those of one node, of its mask as the median of five.
    """
    config = configured(1, num_sampled)
    state, found = first_model(config), dict[str, Any](participants=num_sampled)
    order, done = order_for(config, state, 1, MOST_BITS), dict[str, MaskedRound]()
    for arm in ("masked", "recovered"):
        nodes = Nodes(LocalGrid(make_app(config, arm), NUM_NODES))
        sampled = sample(nodes.roll_call(TIMEOUT_S), config, 1)
        _, done[arm] = masked_round(nodes, sampled, order, TIMEOUT_S)
    plain, request = Stage(), TrainRequest(state, 1, config.dataset, order.learning_rate)
    for _ in nodes.ask(TRAIN, sampled, encode(request), plain, TIMEOUT_S):
        pass
    stages = {"keys": done["masked"].keys, "train": done["masked"].train}
    stages |= {"plain": plain, "reveal": done["recovered"].reveal}
    for name, stage in stages.items():
        found[f"{name}_bytes"] = stage.bytes_sent + stage.bytes_received
    found["mask_s"] = round(median(mask_seconds(num_sampled, state)), 4)
    found["train_s"] = round(plain.seconds / num_sampled, 3)
    return found


def mask_seconds(num_sampled: int, state: State) -> Iterator[float]:
    """Yield how long it takes a node to agree on its seeds and to make its mask, five times."""
    private = [X25519PrivateKey.generate() for _ in range(num_sampled)]
    keys = {i: key.public_key().public_bytes_raw() for i, key in enumerate(private)}
    length = sum(tensor.numel() for tensor in state.values()) + 1
    for _ in range(5):
        began = time.perf_counter()
        mask(0, pair_seeds(0, private[0].private_bytes_raw(), keys, 1), length)
        yield time.perf_counter() - began


def cases() -> list[Case]:
    """Return all runs of the experiment."""
    arms = [Case("float", 1), *(Case("masked", 1, bits) for bits in BITS)]
    arms += [Case(arm, 1) for arm in ("left out", "lost", "recovered", "liar")]
    return [replace(arm, seed=seed) for arm in arms for seed in SEEDS]


def experiment() -> dict[str, Any]:
    """Run everything: accuracy by bits and by what happened, over five seeds, and the costs."""
    with single_thread():
        costs = [cost(number) for number in PARTICIPANTS]
    settings = {"rounds": ROUNDS, "bound": BOUND, "max_examples": MAX_EXAMPLES, "nodes": NUM_NODES}
    return {"settings": settings, "runs": run_all(run, cases()), "costs": costs}
