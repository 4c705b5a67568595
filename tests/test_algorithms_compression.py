"""Smaller updates: what is sent, what is remembered, what is refused, and what a node does."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from course.labs import SEEDS, load, send_less
from course.labs.send_less import (
    ARMS,
    COMPRESSED,
    How,
    make_app,
    replace_nodes,
    rounds,
    with_memory,
)
from fedlib import Config, LocalGrid, Nodes, ReplyError, Stage, state_hash
from fedlib.algorithms.common import moved, sizes
from fedlib.algorithms.compressed_reply import RESIDUAL, read_residual
from fedlib.algorithms.compression import (
    Scheme,
    compress,
    dequantise,
    flatten,
    pack,
    pack_bits,
    quantise,
    top_k,
    unpack,
    unpack_bits,
)
from fedlib.algorithms.messages import CompressedReply
from fedlib.messages import TRAIN, count_bytes, encode

MODEL = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([10.0, 20.0])}
TOP_HALF, TWO_BITS = Scheme(share=0.5), Scheme(bits=2)
FLOATS = st.floats(-100, 100, width=32)
quickly = settings(max_examples=50, deadline=None, database=None, derandomize=True)
VECTORS = arrays(np.float32, st.integers(1, 60), elements=FLOATS)


def test_a_state_becomes_a_vector_in_the_order_of_its_names() -> None:
    vector = flatten(MODEL)
    assert vector.tolist() == [10, 20, 0, 1, 2, 3, 4, 5]
    assert sizes(MODEL) == [2, 6]
    doubled = moved(MODEL, vector)
    assert list(doubled) == ["b", "a"]
    assert torch.equal(doubled["b"], 2 * MODEL["b"])


def test_the_largest_magnitudes_are_sent_and_the_rest_is_remembered() -> None:
    update = np.array([1, -5, 2, 4], dtype=np.float32)
    memory = np.array([0, 3, 3, 0], dtype=np.float32)
    indices, values, rest = compress(update, memory, share=0.5)  # of [1, -2, 5, 4]
    assert (indices.tolist(), values.tolist()) == ([2, 3], [5, 4])
    assert rest.tolist() == [1, -2, 0, 0]
    assert (indices.dtype, values.dtype, rest.dtype) == (np.int32, np.float32, np.float32)
    assert memory.tolist() == [0, 3, 3, 0]


@quickly
@given(VECTORS, st.data(), st.floats(0.01, 0.99))
def test_what_is_sent_and_what_is_kept_add_up_exactly(
    update: Any, data: st.DataObject, share: float
) -> None:
    memory = data.draw(arrays(np.float32, len(update), elements=FLOATS))
    indices, values, rest = compress(update, memory, share)
    sent = np.zeros_like(update)
    sent[indices] = values
    assert (sent + rest == update + memory).all()
    assert not (sent * rest).any()
    left_out = np.delete(np.abs(update + memory), indices)
    assert left_out.max(initial=0) <= np.abs(values).min()


@quickly
@given(VECTORS)
def test_all_that_was_left_out_is_sent_in_the_end(update: Any) -> None:
    """Without new updates, the memory is empty after as many rounds as it takes to send all."""
    memory, total = update, np.zeros_like(update)
    for _ in range(11):
        indices, values, memory = compress(np.zeros_like(update), memory, 0.1)
        total[indices] += values
    assert len(update) > 110 or (total == update).all()


@quickly
@given(VECTORS, st.integers(2, 8), st.integers(0, 99))
def test_a_value_is_rounded_to_a_level_next_to_it(vector: Any, bits: int, seed: int) -> None:
    cut = [len(vector) // 2, len(vector) - len(vector) // 2]
    codes, scales = quantise(vector, cut, bits, np.random.default_rng(seed))
    assert codes.max() <= 2**bits - 2
    back = dequantise(codes, scales, cut, bits)
    step = np.repeat(scales, cut) / (2 ** (bits - 1) - 1)
    assert (np.abs(back - vector) <= step * (1 + 1e-6)).all()
    largest = np.abs(vector) == np.repeat(scales, cut)
    assert np.allclose(back[largest], vector[largest], rtol=1e-6, atol=0)


def test_rounding_is_right_on_average() -> None:
    vector, repeats = np.array([1.0, 0.3, -0.7, 0.0, 0.05], dtype=np.float32), 40_000
    many = np.tile(vector, repeats)
    codes, scales = quantise(many, [len(many)], 2, np.random.default_rng(1))
    back = dequantise(codes, scales, [len(many)], 2).reshape(repeats, 5)
    assert set(np.unique(back)) == {-1, 0, 1}
    magnitude = np.abs(vector)
    error = np.sqrt(magnitude * (1 - magnitude) / repeats)  # of a coin's mean
    assert (np.abs(back.mean(axis=0) - vector) <= 4 * error).all()
    assert (back[:, [0, 3]] == [1, 0]).all()


@quickly
@given(st.integers(2, 8), st.data())
def test_codes_come_back_from_as_few_bytes_as_they_need(bits: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 40))
    codes = data.draw(arrays(np.uint8, number, elements=st.integers(0, 2**bits - 1)))
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-number * bits // 8)
    assert (unpack_bits(packed, number, bits) == codes).all()


def test_four_codes_of_two_bits_are_one_byte() -> None:
    codes = np.array([0, 1, 2, 1, 2], dtype=np.uint8)
    assert pack_bits(codes, 2).tolist() == [0b00_01_10_01, 0b10_00_00_00]


def test_a_packed_update_is_unpacked_to_what_was_sent() -> None:
    update, rng = flatten(MODEL) - 9, np.random.default_rng(3)
    sparse = unpack(tensors(pack(update, TOP_HALF, sizes(MODEL), rng)), TOP_HALF, MODEL)
    assert sparse.tolist() == [0, 11, -9, -8, -7, 0, 0, 0]  # top_k: 11, -9, -8, -7
    coarse = unpack(tensors(pack(update, TWO_BITS, sizes(MODEL), rng)), TWO_BITS, MODEL)
    assert set(coarse[:2]) <= {-11, 0, 11}
    assert set(coarse[2:]) <= {-9, 0, 9}
    assert top_k(update, 0.001)[0].tolist() == [1]  # at least one


def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


RNG = np.random.default_rng(0)
GOOD = {s: pack(flatten(MODEL), s, sizes(MODEL), RNG) for s in (TOP_HALF, TWO_BITS)}
FAULTS: list[tuple[Scheme, dict[str, Any], str]] = [
    (TOP_HALF, {"indices": np.int32([0, 1, 2, 8])}, "indices: expected 0 to 7, got 0 to 8"),
    (TOP_HALF, {"indices": np.int32([-1, 1, 2, 3])}, "got -1 to 3"),
    (TOP_HALF, {"indices": np.int32([1, 1, 2, 3])}, "got one twice"),
    (TOP_HALF, {"indices": np.int64([0, 1, 2, 3])}, "4 of int32, got shape (4,) of int64"),
    (TOP_HALF, {"values": np.float32([1, 2, 3])}, "4 of float32, got shape (3,)"),
    (TOP_HALF, {"values": np.float32([1, 2, 3, np.nan])}, "values: expected finite values"),
    (TOP_HALF, {"more": np.float32([1])}, "the arrays indices, values, got indices, more, values"),
    (TWO_BITS, {"codes": np.uint8([0, 0, 0])}, "codes: expected 2 of uint8, got shape (3,)"),
    (TWO_BITS, {"codes": np.uint8([255, 0])}, "codes to 2, got 5.0 and 3"),
    (TWO_BITS, {"scales": np.float32([np.inf, 1])}, "scales: expected finite values"),
    (TWO_BITS, {"scales": np.float32([-1, 1])}, "scales from 0, codes to 2, got -1.0"),
    (TWO_BITS, {"scales": np.float32([1])}, "scales: expected 2 of float32"),
]


@pytest.mark.parametrize("scheme, change, line", FAULTS)
def test_a_damaged_update_is_refused_in_one_line(
    scheme: Scheme, change: dict[str, Any], line: str
) -> None:
    with pytest.raises(ReplyError) as caught:
        unpack(tensors(GOOD[scheme] | change), scheme, MODEL)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"share": 0.0}, {"share": 0.5, "bits": 8}, {"bits": 9}, {"bits": 8, "feedback": 1}],
)
def test_a_scheme_makes_something_smaller_in_one_way(wrong: dict[str, Any]) -> None:
    with pytest.raises(ReplyError, match="scheme: expected a share below 1"):
        Scheme(**wrong)


# --- nodes


def first_round(config: Config, arm: How) -> tuple[LocalGrid, Any, Stage]:
    grid = LocalGrid(make_app(config), 4)
    how = ARMS.get(arm, arm) if isinstance(arm, str) else arm
    _, model, stage = next(rounds(grid, config, how))
    assert not stage.problems
    return grid, model, stage


def test_with_all_values_it_is_fedavg(small_config: Config) -> None:
    every = Scheme(share=1 - 1e-7)
    plain, nearly = (first_round(small_config, how)[1] for how in ("FedAvg", every))
    assert all(torch.allclose(plain[k], nearly[k], rtol=0, atol=1e-6) for k in plain)


def test_a_reply_has_the_bytes_that_its_numbers_need(small_config: Config) -> None:
    received = {arm: first_round(small_config, arm)[2].bytes_received for arm in list(ARMS)[:5]}
    values = 80_298
    assert received["FedAvg"] == pytest.approx(2 * 4 * values, rel=0.02)
    assert received["top 10 %"] == pytest.approx(2 * 8 * 0.1 * values, rel=0.02)
    assert received["8 bits"] == pytest.approx(2 * values, rel=0.02)
    assert received["2 bits"] == pytest.approx(2 * values / 4, rel=0.05)


def test_the_seed_decides_every_bit(small_config: Config) -> None:
    for arm in ("2 bits", "top 10 %, feedback"):
        first, second = (first_round(small_config, arm)[1] for _ in range(2))
        assert state_hash(first) == state_hash(second)


def test_only_feedback_leaves_something_in_the_nodes_state(small_config: Config) -> None:
    assert not with_memory(first_round(small_config, "top 10 %")[0])
    grid, _, _ = first_round(small_config, "top 10 %, feedback")
    keepers = with_memory(grid)
    assert len(keepers) == 2
    state = grid.contexts[keepers[0] + 2].state
    residual = read_residual(state, 80_298)
    assert np.count_nonzero(residual) == pytest.approx(0.9 * 80_298, rel=0.05)
    replace_nodes(grid, keepers[:1])
    assert with_memory(grid) == keepers[1:]
    assert not read_residual(state, 80_298).any()


def test_a_residual_of_another_model_is_refused(small_config: Config) -> None:
    grid = LocalGrid(make_app(small_config), 4)
    for context in grid.contexts.values():
        context.state[RESIDUAL] = ArrayRecord({RESIDUAL: Array(np.zeros(3, dtype=np.float32))})
    _, _, stage = next(rounds(grid, small_config, ARMS["top 10 %, feedback"]))
    assert stage.num_received == 0
    assert "residual: expected 80298 values, got 3; clear the state" in stage.problems[0]


def test_a_damaged_reply_does_not_stop_the_round(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = CompressedReply({"codes": torch.zeros(3, dtype=torch.uint8)}, 10, 1.0, 10)
    grid = LocalGrid(make_app(small_config), 4)
    ask, spoilt = Nodes.ask, list[int]()

    def ask_and_spoil(self: Nodes, message_type: str, *args: Any, **named: Any) -> Any:
        for node_id, reply in ask(self, message_type, *args, **named):
            first = message_type == COMPRESSED and not spoilt
            spoilt.append(node_id)
            yield node_id, damaged if first else reply

    monkeypatch.setattr(Nodes, "ask", ask_and_spoil)
    _, _, stage = next(rounds(grid, small_config, ARMS["2 bits"]))
    assert (stage.num_received, stage.num_errors) == (1, 1)
    assert f"node {spoilt[0]}" in stage.problems[0]
    assert "expected the arrays codes, scales, got codes" in stage.problems[0]


def test_a_reply_is_read_back_from_its_message() -> None:
    reply = CompressedReply(tensors(GOOD[TWO_BITS]), 5, 1.0, 5)
    assert count_bytes(encode(reply)) > 0
    assert f"{TRAIN}.compressed" == send_less.COMPRESSED


# --- the saved experiment


def test_the_saved_results_have_every_arm_with_every_seed() -> None:
    saved = load("send_less")
    for alpha, arm, seed in send_less.cases():
        assert str(seed) in saved[f"{alpha:g}"][arm]
    assert len(SEEDS) >= 5


def test_a_case_computed_anew_equals_the_saved_one() -> None:
    """Its first two rounds, which are quick."""
    config = send_less.settings(1.0, 1)
    dataset = send_less.open_dataset(config.dataset)
    found = []
    for server_round, model, _ in rounds(
        LocalGrid(make_app(config), send_less.NUM_NODES), config, ARMS["2 bits"]
    ):
        found.append(round(send_less.accuracy(model, dataset), 2))
        if server_round == 2:
            break
    assert found == pytest.approx(load("send_less")["1"]["2 bits"]["1"]["accuracy"][:2], abs=0.3)
