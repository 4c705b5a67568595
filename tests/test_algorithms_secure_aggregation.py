"""Secure aggregation: masks cancel, a round gives the sum and nothing else, nodes refuse more."""

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from apps import make_config
from fedlib import (
    ConfigError,
    FedAvg,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    State,
    clone_state,
    make_model,
    open_dataset,
    state_hash,
)
from fedlib.algorithms.common import flatten, moved
from fedlib.algorithms.masks import (
    FixedPoint,
    Integers,
    keystream,
    mask,
    pair_seed,
    recover,
)
from fedlib.algorithms.messages import (
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
from fedlib.algorithms.secure_aggregation import make_masked_app, masked_round, read_integers
from fedlib.messages import TRAIN, TrainRequest, decode, encode

NUM_NODES = 5
POINT = FixedPoint(bits=24, bound=2.0, max_examples=1000, num_nodes=NUM_NODES)
ids = st.sets(st.integers(0, 2**63 - 1), min_size=2, max_size=7)


def seeds_of(nodes: list[int]) -> dict[int, dict[int, bytes]]:
    """A seed for each pair, as both have it; any will do here."""

    def seed(one: int, other: int) -> bytes:
        return hashlib.sha256(repr(sorted((one, other))).encode()).digest()

    return {i: {j: seed(i, j) for j in nodes if j != i} for i in nodes}


def total_of(parts: list[Integers]) -> Integers:
    return np.sum(np.stack(parts), axis=0, dtype=np.uint32)


# --- masks


@given(nodes=ids)
def test_masks_of_any_set_of_nodes_cancel(nodes: set[int]) -> None:
    parts = [mask(i, seeds, 9) for i, seeds in seeds_of(sorted(nodes)).items()]
    assert not total_of(parts).any()
    assert all(part.any() for part in parts)


@given(nodes=ids, data=st.data())
def test_whoever_drops_out_the_sum_of_the_others_is_recovered(
    nodes: set[int], data: st.DataObject
) -> None:
    dropped = data.draw(st.sets(st.sampled_from(sorted(nodes)), max_size=len(nodes) - 1))
    seeds, left = seeds_of(sorted(nodes)), sorted(nodes - dropped)
    values = {i: keystream(bytes([n]) * 32, 9) for n, i in enumerate(left)}
    total = total_of([values[i] + mask(i, seeds[i], 9) for i in left])
    revealed = {i: {j: seeds[i][j] for j in dropped} for i in left}
    assert (recover(total, revealed) == total_of(list(values.values()))).all()
    if dropped:
        assert (total != total_of(list(values.values()))).any()


def test_a_stream_is_chacha20s_as_its_rfc_has_it() -> None:
    """RFC 7539, appendix A.1, test vector 1: key, nonce and counter are zero."""
    assert keystream(bytes(32), 2).astype("<u4").tobytes().hex() == "76b8e0ada0f13d90"


def test_both_nodes_get_the_seed_that_x25519_and_hkdf_give() -> None:
    """HKDF of RFC 5869, written out with Python's own hmac."""
    alice, bob = (X25519PrivateKey.generate().private_bytes_raw() for _ in range(2))
    public = [X25519PrivateKey.from_private_bytes(k).public_key() for k in (alice, bob)]
    secret = X25519PrivateKey.from_private_bytes(alice).exchange(public[1])
    extracted = hmac.digest(bytes(32), secret, "sha256")
    info = b"fedlib masks, round 3, nodes 4 and 9"
    wanted = hmac.digest(extracted, info + b"\x01", "sha256")
    keys = [key.public_bytes_raw() for key in public]
    assert pair_seed(alice, keys[1], 3, 9, 4) == pair_seed(bob, keys[0], 3, 4, 9) == wanted
    others = {pair_seed(alice, keys[1], r, i, j) for r, i, j in ((4, 9, 4), (3, 9, 5), (3, 8, 4))}
    assert len(others | {wanted}) == 4


def test_a_public_key_without_a_secret_is_refused() -> None:
    private = X25519PrivateKey.generate().private_bytes_raw()
    with pytest.raises(ReplyError, match="node 4: expected a usable public key"):
        pair_seed(private, bytes(32), 1, 9, 4)  # the point of order one


# --- fixed-point numbers


@settings(deadline=None)
@given(
    st.integers(8, 32),
    st.lists(st.tuples(st.integers(1, 2000), st.floats(-2, 2)), min_size=1, max_size=20),
)
def test_the_sum_never_overflows_and_is_off_by_half_a_step_a_node(
    bits: int, replies: list[tuple[int, float]]
) -> None:
    point = FixedPoint(bits, 0.5, 1000, len(replies))
    sums = [int(point.encode(np.array([v]), n).view(np.int32)[0]) for n, v in replies]
    assert abs(sum(sums)) <= 2 ** (bits - 1) - 1
    total = total_of([point.encode(np.array([v]), n) for n, v in replies])
    [mean], num_examples = point.decode(total)
    weights = np.array([min(n, 1000) for n, _ in replies])
    wanted = np.average(np.clip([v for _, v in replies], -0.5, 0.5), weights=weights)
    assert num_examples == weights.sum()
    step = 1 / (point.scale * num_examples)
    assert abs(mean - wanted) <= step * len(replies) / 2 + 1e-9


def test_a_number_by_hand() -> None:
    point = FixedPoint(bits=8, bound=0.5, max_examples=10, num_nodes=3)
    assert point.levels == 42  # of 127
    assert point.encode(np.array([0.5, -0.25, 9.0]), 5).view(np.int32).tolist() == [21, -10, 21, 5]


@pytest.mark.parametrize(
    "given, word",
    [
        ((33, 0.5, 10, 3), "2 to 32 bits"),
        ((4, 0.5, 10, 8), "enough for a sum over 8 nodes"),
        ((8, 0.0, 10, 3), "a bound above 0"),
        ((8, 0.5, 2**30, 2), "below 2"),
    ],
)
def test_impossible_numbers_are_refused(given: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        FixedPoint(*given)


def test_a_state_comes_back_from_its_vector() -> None:
    state = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0, dtype=torch.float64)}
    assert flatten(state).tolist() == [3, 1, 2]
    new = moved(state, np.array([0.5, 1.0, -1.0]))
    assert list(new) == ["b", "a"]
    assert [(new[k].tolist(), new[k].dtype) for k in new] == [
        ([[2.0, 1.0]], torch.float32),
        (3.5, torch.float64),
    ]
    with pytest.raises(ConfigError, match=r"steps: expected floats, got torch\.int64"):
        flatten({"steps": torch.tensor(3)})


# --- a round, on real nodes


class Federation:
    """Five nodes and a first model; ``bad`` nodes answer ``train.masked`` with an error."""

    def __init__(self, folder: Path, bad: set[int] | None = None, silent: str = "") -> None:
        self.config = make_config(folder, folder)
        app = make_masked_app(self.config)

        def gone(message: Message) -> bool:
            metadata = message.metadata
            stage = silent or MASKED
            return metadata.dst_node_id in (bad or ()) and metadata.message_type == stage

        class Grid(LocalGrid):
            def _run(self, message: Message) -> Message | None:
                if gone(message):
                    self.client_app, kept = ClientAppThatFails(), self.client_app
                    try:
                        return super()._run(message)
                    finally:
                        self.client_app = kept
                return super()._run(message)

        self.nodes = Nodes(Grid(app, NUM_NODES))
        self.ids = self.nodes.roll_call(20)
        dataset = open_dataset(self.config.dataset)
        self.state = clone_state(make_model(dataset, torch.Generator().manual_seed(1)))

    def order(self, server_round: int = 1, keys: dict[int, bytes] | None = None) -> MaskedRequest:
        keys = keys or {0: bytes(32)}
        name = self.config.dataset
        common = {"bits": 24, "bound": 2.0, "max_examples": 1000}
        return MaskedRequest(
            self.state, server_round, name, 0.05, list(keys), list(keys.values()), **common
        )

    def train(self) -> dict[int, Any]:
        request = TrainRequest(self.state, 1, self.config.dataset, 0.05)
        return dict(self.nodes.ask(TRAIN, self.ids, encode(request), Stage(), 20))

    def ask(self, kind: str, node: int, content: RecordDict, reply: type) -> Any:
        """Ask one node; return its reply, or the line why not."""
        stage = Stage()
        for _, came in self.nodes.ask(kind, [node], content, stage, 20, kind=reply):
            return came
        [problem] = stage.problems
        return problem

    def keys(self, server_round: int = 1) -> dict[int, bytes]:
        content = encode(KeysRequest(server_round))
        return {i: self.ask(KEYS, i, content, KeysReply).public_key for i in self.ids}


class ClientAppThatFails:
    def __call__(self, message: Message, context: Any) -> Message:
        raise RuntimeError("the battery is empty")


def plain_sum(replies: dict[int, Any], state: State, left: list[int]) -> Integers:
    """The sum of the same integers, of nodes that hide nothing."""
    return total_of(
        [
            POINT.encode(flatten(replies[i].model) - flatten(state), replies[i].num_examples)
            for i in left
        ]
    )


@pytest.mark.parametrize("num_dropped", [0, 1, 2])
def test_a_round_gives_the_sum_of_those_who_answered(small_folder: Path, num_dropped: int) -> None:
    bad = {2, 4} if num_dropped == 2 else {3} if num_dropped else set[int]()
    there = Federation(small_folder, bad)
    total, done = masked_round(there.nodes, there.ids, there.order(), 20)
    left = [i for i in there.ids if i not in bad]
    replies = there.train()
    assert done.dropped == sorted(bad)
    assert (total == plain_sum(replies, there.state, left)).all()
    update, num_examples = POINT.decode(total)
    fedavg = FedAvg(there.state)
    for i in left:
        fedavg.add(replies[i].model, replies[i].num_examples)
    assert num_examples == fedavg.num_examples
    found, wanted = flatten(moved(there.state, update)), flatten(fedavg.result())
    assert np.abs(found - wanted).max() < 1e-5


def test_other_keys_give_the_same_model(small_folder: Path) -> None:
    def once() -> tuple[str, bytes]:
        there = Federation(small_folder)
        total, _ = masked_round(there.nodes, there.ids, there.order(), 20)
        return state_hash(moved(there.state, POINT.decode(total)[0])), there.keys(2)[2]

    (one, key), (other, other_key) = once(), once()
    assert one == other
    assert key != other_key


def test_without_the_seeds_the_sum_is_noise(small_folder: Path) -> None:
    there = Federation(small_folder, bad={3})
    total, _ = masked_round(there.nodes, there.ids, there.order(), 20, reveal=False)
    with pytest.raises(ReplyError, match="masks are left in it"):
        POINT.decode(total)
    # Of uniform numbers, each of the 16 highest nibbles comes as often: chi squared, 15 degrees.
    counts = np.bincount(total >> 28, minlength=16)
    assert ((counts - len(total) / 16) ** 2 / (len(total) / 16)).sum() < 60


def test_a_round_with_too_many_lost_or_a_secretive_survivor_is_lost(small_folder: Path) -> None:
    there = Federation(small_folder, bad={2, 3, 4})
    with pytest.raises(ReplyError, match=r"masked: expected 3 or more answers, got 2.*battery"):
        masked_round(there.nodes, there.ids, there.order(), 20)
    there = Federation(small_folder, bad={2}, silent=REVEAL)
    keys = there.keys()
    for i in there.ids[:4]:
        there.ask(MASKED, i, encode(there.order(keys=keys)), MaskedReply)
    reply = there.ask(REVEAL, 2, encode(RevealRequest(1, [6])), RevealReply)
    assert "the battery is empty" in reply


def test_a_reply_alone_looks_like_noise_and_differs_each_time(small_folder: Path) -> None:
    there = Federation(small_folder)
    replies = []
    for server_round in (1, 2):
        keys = there.keys(server_round)
        content = encode(there.order(server_round, keys))
        replies.append(there.ask(MASKED, 2, content, MaskedReply).masked["integers"])
    for reply in replies:
        counts = torch.bincount((reply.long() % 16), minlength=16).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 60
    assert (replies[0] == replies[1]).double().mean() < 0.001


# --- what a node refuses


def other_key(keys: dict[int, bytes]) -> dict[int, bytes]:
    return keys | {2: X25519PrivateKey.generate().public_key().public_bytes_raw()}


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda keys: {2: keys[2], 3: keys[3]}, "expected 3 nodes or more, got 2"),
        (lambda keys: {i: k for i, k in keys.items() if i != 2}, "that it sent, got none"),
        (other_key, "node 2: expected the public key that it sent, got another"),
        (lambda keys: keys | {3: keys[2]}, "a public key for each node, got one for nodes [2, 3]"),
        (lambda keys: keys | {4: keys[3]}, "got one for nodes [3, 4]"),
        (lambda keys: keys | {3: keys[3][:31]}, "5 times 32 bytes, got [32, 31, 32, 32, 32]"),
        (lambda keys: keys | {3: bytes(32)}, "node 3: expected a usable public key"),
    ],
)
def test_a_node_does_not_mask_for_keys_of_a_dishonest_round(
    small_folder: Path, change: Callable[[dict[int, bytes]], dict[int, bytes]], word: str
) -> None:
    there = Federation(small_folder)
    keys = change(there.keys())
    content = encode(there.order(keys={i: bytes(32) for i in keys}))
    content.config_records["config"]["public-keys"] = list(keys.values())
    assert word in there.ask(MASKED, 2, content, MaskedReply)


def test_a_round_has_one_key_one_mask_and_one_reveal(small_folder: Path) -> None:
    there = Federation(small_folder)
    reveal = encode(RevealRequest(1, [6]))
    assert "there is no mask" in there.ask(REVEAL, 2, reveal, RevealReply)
    content = encode(there.order(keys={i: bytes([i]) * 32 for i in there.ids}))
    assert "there is no key" in there.ask(MASKED, 2, content, MaskedReply)
    keys = there.keys()
    again = there.ask(KEYS, 2, encode(KeysRequest(1)), KeysReply)
    assert "keys: expected a round after 1, got 1" in again
    assert "there is no mask" in there.ask(REVEAL, 2, reveal, RevealReply)
    content = encode(there.order(keys=keys))
    assert isinstance(there.ask(MASKED, 2, content, MaskedReply), MaskedReply)
    assert "a mask serves once" in there.ask(MASKED, 2, content, MaskedReply)
    old = encode(RevealRequest(7, [6]))
    assert "round 7: there is no mask" in there.ask(REVEAL, 2, old, RevealReply)
    assert isinstance(there.ask(REVEAL, 2, reveal, RevealReply), RevealReply)
    assert "there is no mask" in there.ask(REVEAL, 2, reveal, RevealReply)
    assert "a mask serves once" in there.ask(MASKED, 2, content, MaskedReply)


@pytest.mark.parametrize(
    "dropped, word",
    [
        ([2], "node 2 has not dropped out, and reveals nothing of itself"),
        ([9], "expected nodes of the round, got [9]"),
        ([3, 4, 5], "expected 3 or more of 5 nodes to be left, got 2"),
        ([3, 3], "expected different whole numbers, got [3, 3]"),
    ],
)
def test_a_node_reveals_no_more_than_the_sum(
    small_folder: Path, dropped: list[int], word: str
) -> None:
    there = Federation(small_folder)
    there.ask(MASKED, 2, encode(there.order(keys=there.keys())), MaskedReply)
    content = encode(RevealRequest(1, [3]))
    content.config_records["config"]["node-ids"] = dropped
    assert word in there.ask(REVEAL, 2, content, RevealReply)


def test_a_node_keeps_no_private_key_once_it_has_masked(small_folder: Path) -> None:
    there = Federation(small_folder)
    keys = there.keys()
    grid: Any = there.nodes.grid
    secret = grid.contexts[2].state.config_records["secure-aggregation"]
    assert set(secret) == {"round", "private-key"}
    there.ask(MASKED, 2, encode(there.order(keys=keys)), MaskedReply)
    assert set(grid.contexts[2].state.config_records["secure-aggregation"]) == {
        *("round", "nodes", "seeds")
    }


def test_a_model_that_diverged_is_not_sent() -> None:
    with pytest.raises(ReplyError, match="expected a finite update"):
        POINT.encode(np.array([np.nan]), 3)


@pytest.mark.parametrize(
    "masked",
    [
        {},
        {"integers": torch.zeros(3)},
        {"integers": torch.zeros(4, dtype=torch.int32)},
        {"integers": torch.zeros(3, dtype=torch.int32), "more": torch.zeros(1)},
    ],
)
def test_a_reply_of_another_shape_is_refused(masked: State) -> None:
    with pytest.raises(ReplyError, match="masked: expected 3 integers"):
        read_integers(MaskedReply(masked), 3)


def test_keys_of_the_wrong_length_are_refused_on_the_wire() -> None:
    with pytest.raises(ReplyError, match=r"public-key: expected 1 times 32 bytes, got \[31\]"):
        decode(KeysReply, RecordDict({"config": ConfigRecord({"public-key": bytes(31)})}))


# --- the lab's saved results


def test_the_saved_experiment_has_five_seeds_and_comes_out_again() -> None:
    from course.labs import load
    from course.labs.masks import Case, cases, run

    saved = load("masks")
    arms = {(r["arm"], r["bits"]): [] for r in saved["runs"]}
    for r in saved["runs"]:
        arms[r["arm"], r["bits"]].append(r["seed"])
    assert all(sorted(seeds) == [1, 2, 3, 4, 5] for seeds in arms.values())
    assert set(arms) == {(case.arm, case.bits) for case in cases()}
    [kept] = (r for r in saved["runs"] if (r["arm"], r["bits"], r["seed"]) == ("masked", 8, 1))
    anew = run(Case("masked", 1, 8), rounds=2)
    assert anew["accuracies"] == kept["accuracies"][:2]
