"""FedAvg against exact fractions, NumPy, and Flower's own strategy."""

import functools
import itertools
import math
import operator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedlib.aggregation import FedAvg
from fedlib.errors import ReplyError
from fedlib.local_grid import LocalGrid
from fedlib.model import check_state

Replies = list[tuple[dict[str, Tensor], int]]

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)

RELATIVE = {np.float32: 1e-5, np.float64: 1e-12}


def mean_of(replies: Replies, reference: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    fedavg = FedAvg(replies[0][0] if reference is None else reference)
    for state, num_examples in replies:
        fedavg.add(state, num_examples)
    return fedavg.result()


def bits(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


@st.composite
def numpy_replies(draw: st.DrawFn) -> list[tuple[dict[str, np.ndarray], int]]:
    """One to six clients; one to three float tensors of any shape, 0-d and empty ones too."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_side=4), min_size=1, max_size=3))
    elements = st.floats(-1e4, 1e4, width=32)
    return [
        (
            {
                f"layer{i}.weight": draw(hnp.arrays(dtype, shape, elements=elements))
                for i, shape in enumerate(shapes)
            },
            draw(st.integers(1, 100_000)),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


def as_torch(replies: list[tuple[dict[str, np.ndarray], int]]) -> Replies:
    return [({k: torch.tensor(v) for k, v in state.items()}, n) for state, n in replies]


@QUICK
@given(numpy_replies())
def test_mean_equals_numpy_in_float64(replies: list[tuple[dict[str, np.ndarray], int]]) -> None:
    mean = mean_of(as_torch(replies))
    weights = [n for _, n in replies]
    for name, first in replies[0][0].items():
        stacked = np.stack([state[name].astype(np.float64) for state, _ in replies])
        expected = np.average(stacked, axis=0, weights=weights)
        scale = np.abs(stacked).max(initial=0.0)
        assert mean[name].numpy().dtype == first.dtype
        np.testing.assert_allclose(
            mean[name].numpy(),
            expected,
            rtol=np.finfo(first.dtype).eps,
            atol=1e-15 * scale + np.finfo(np.float32).smallest_subnormal,
        )


@QUICK
@given(numpy_replies())
def test_mean_equals_flowers_own_fedavg(replies: list[tuple[dict[str, np.ndarray], int]]) -> None:
    LocalGrid(ClientApp(), num_nodes=1)  # gives messages a sender
    mean = mean_of(as_torch(replies))
    incoming = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({k: torch.tensor(v) for k, v in state.items()}),
                    "metrics": MetricRecord({"num-examples": n}),
                }
            ),
            reply_to=Message(RecordDict(), dst_node_id=2, message_type="train"),
        )
        for state, n in replies
    ]
    arrays, _ = FlowerFedAvg().aggregate_train(1, incoming)
    assert arrays is not None
    assert set(arrays) == set(mean)
    for name, array in arrays.items():
        dtype = replies[0][0][name].dtype
        scale = max(np.abs(state[name]).max(initial=0.0) for state, _ in replies)
        # Flower adds in the tensors' own dtype, hence the tolerance.
        np.testing.assert_allclose(
            mean[name].numpy(), array.numpy(), rtol=0, atol=RELATIVE[dtype.type] * scale + 1e-40
        )


def scalars(values: list[float], dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor([value], dtype=dtype)} for value in values]


WIDE_FLOATS = st.builds(
    lambda digits, exponent: digits * 2.0**exponent,
    st.integers(-(2**24), 2**24),
    st.integers(-50, 0),
)
"""Exact float32 values of either sign, up to 22 orders of magnitude apart."""


@QUICK
@given(st.lists(st.tuples(WIDE_FLOATS, st.integers(1, 1_000)), min_size=2, max_size=5), st.data())
def test_order_of_replies_changes_no_bit(
    pairs: list[tuple[float, int]], data: st.DataObject
) -> None:
    states = scalars([value for value, _ in pairs])
    replies = [(state, n) for state, (_, n) in zip(states, pairs, strict=True)]
    shuffled = data.draw(st.permutations(replies))
    assert bits(mean_of(replies)) == bits(mean_of(shuffled))


def test_every_order_of_five_models_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(5)
    replies: Replies = []
    for client in range(5):
        magnitude = 10.0 ** torch.randint(-8, 9, (3, 7), generator=generator)
        weight = torch.randn(3, 7, generator=generator) * magnitude
        replies.append(({"weight": weight, "bias": weight[0].clone()}, 7 * client + 1))
    results = [bits(mean_of(list(order))) for order in itertools.permutations(replies)]
    assert len(results) == 120
    assert all(result == results[0] for result in results)


def test_plain_summation_depends_on_the_order_and_fedavg_does_not() -> None:
    values = [1e17, 1.0, -1e17]
    # Not sum(), which Python 3.12 taught to compensate.
    naive = {functools.reduce(operator.add, order) for order in itertools.permutations(values)}
    naive32 = {
        float(np.float32(np.float32(np.float32(a) + np.float32(b)) + np.float32(c)))
        for a, b, c in itertools.permutations(values)
    }
    assert naive == {0.0, 1.0}
    assert naive32 == {0.0, 1.0}
    for order in itertools.permutations(values):
        mean = mean_of([(state, 1) for state in scalars(list(order))])
        assert mean["w"].item() == np.float32(1 / 3)


FINITE_FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@QUICK
@given(st.lists(st.tuples(FINITE_FLOAT32, st.integers(1, 60_000)), min_size=1, max_size=6))
def test_mean_of_any_finite_float32_is_off_by_rounding_only(
    pairs: list[tuple[float, int]],
) -> None:
    replies = [
        (state, n) for state, (_, n) in zip(scalars([v for v, _ in pairs]), pairs, strict=True)
    ]
    terms = [Fraction(value) * n for value, n in pairs]
    weight = sum(n for _, n in pairs)
    exact = sum(terms) / weight
    error = abs(Fraction(mean_of(replies)["w"].item()) - exact)
    rounding = abs(exact) / 2**23 + Fraction(2) ** -149  # of one float32
    assert error <= rounding + sum(map(abs, terms)) / weight / 2**95


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_mean_is_rounded_once(dtype: torch.dtype) -> None:
    # (1 * 1 + 2 * 2) / 3 = 5/3, to 10, 7 and 23 binary digits after the point.
    expected = {
        torch.float16: 1707 / 2**10,
        torch.bfloat16: 213 / 2**7,
        torch.float32: 13981013 / 2**23,
    }[dtype]
    first, second = scalars([1.0, 2.0], dtype)
    mean = mean_of([(first, 1), (second, 2)])["w"]
    assert mean.dtype == dtype
    assert mean.item() == expected


def test_float16_sums_beyond_its_largest_value_do_not_overflow() -> None:
    replies = [(state, 1_000) for state in scalars([60_000.0, 49_952.0], torch.float16)]
    assert mean_of(replies)["w"].item() == 54_976.0


def test_small_weights_by_hand() -> None:
    replies: Replies = [
        ({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 1),
        ({"w": torch.tensor([[5.0, -2.0], [3.0, 0.0]])}, 3),
    ]
    assert torch.equal(mean_of(replies)["w"], torch.tensor([[4.0, -1.0], [3.0, 1.0]]))


def test_integer_buffers_take_the_rounded_weighted_mean() -> None:
    replies: Replies = [
        ({"n": torch.tensor([10, -10, 0, 7]), "b": torch.tensor(200, dtype=torch.uint8)}, 1),
        ({"n": torch.tensor([20, -20, 1, 7]), "b": torch.tensor(250, dtype=torch.uint8)}, 2),
    ]
    mean = mean_of(replies)  # 50/3, -50/3, 2/3, 7 and 700/3
    assert mean["n"].dtype == torch.int64
    assert mean["n"].tolist() == [17, -17, 1, 7]
    assert mean["b"].dtype == torch.uint8
    assert mean["b"].item() == 233


def test_bool_buffers_take_the_weighted_majority() -> None:
    replies: Replies = [
        ({"flag": torch.tensor([True, True, False, True])}, 2),
        ({"flag": torch.tensor([True, False, True, False])}, 1),
        ({"flag": torch.tensor([True, False, True, False])}, 4),
    ]
    mean = mean_of(replies)
    assert mean["flag"].dtype == torch.bool
    assert mean["flag"].tolist() == [True, False, True, False]


def test_batch_norm_state_keeps_its_dtypes() -> None:
    states = [torch.nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    states[0]["num_batches_tracked"] += 4
    states[1]["num_batches_tracked"] += 8
    states[1]["running_mean"] += 1.5
    mean = mean_of([(dict(states[0]), 1), (dict(states[1]), 2)])
    assert list(mean) == list(states[0])
    assert mean["num_batches_tracked"].dtype == torch.int64
    assert mean["num_batches_tracked"].item() == 7  # (4 + 16) / 3 = 6.67
    assert mean["running_mean"].tolist() == [1.0, 1.0]


def test_without_replies_the_result_is_a_copy_of_the_reference() -> None:
    reference = {"w": torch.tensor([1.5, 2.5]), "n": torch.tensor(3)}
    result = FedAvg(reference).result()
    assert bits(result) == bits(reference)
    result["w"].zero_()
    result["n"].zero_()
    assert reference["w"].tolist() == [1.5, 2.5]
    assert reference["n"].item() == 3


NOT_MINUS_ZERO = FINITE_FLOAT32.filter(lambda v: math.copysign(1, v) > 0 or v != 0)


@QUICK
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_side=4), elements=NOT_MINUS_ZERO),
    st.integers(1, 1_000_000),
)
def test_single_float32_reply_comes_back_bit_for_bit(values: np.ndarray, num_examples: int) -> None:
    state = {"w": torch.tensor(values)}
    assert bits(mean_of([(state, num_examples)])) == bits(state)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.linspace(-3, 3, 101, dtype=torch.float16),
        torch.linspace(-3, 3, 101, dtype=torch.bfloat16),
        torch.arange(-50, 50),
        torch.arange(100) % 3 == 0,
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_single_reply_of_another_dtype_comes_back_bit_for_bit(tensor: Tensor) -> None:
    for num_examples in (1, 3, 7, 49, 1_200):
        result = mean_of([({"w": tensor}, num_examples)])
        assert bits(result) == bits({"w": tensor}), f"num_examples={num_examples}"


def test_single_float64_reply_comes_back_within_one_unit_in_the_last_place() -> None:
    """Twice rounded: the value times its weight needs more digits than float64 has."""
    values = torch.linspace(-3, 3, 101, dtype=torch.float64)
    result = mean_of([({"w": values}, 49)])["w"].numpy()
    np.testing.assert_array_max_ulp(result, values.numpy(), maxulp=1)


def test_weights_as_large_as_the_wire_allows_do_not_stop_the_server() -> None:
    replies = [(state, 2**63 - 1) for state in scalars([1.0, 3.0, 1.0, 3.0])]
    assert mean_of(replies)["w"].item() == 2.0


def test_result_and_running_mean_share_no_memory_with_anything() -> None:
    state = {"w": torch.tensor([2.0])}
    fedavg = FedAvg(state)
    fedavg.add(state, 1)
    state["w"].fill_(99.0)
    fedavg.result()["w"].fill_(77.0)
    assert fedavg.result()["w"].item() == 2.0


def test_the_reference_itself_has_no_weight() -> None:
    reference = {"w": torch.tensor([1e6])}
    replies = [(state, 5) for state in scalars([1.0, 3.0])]
    assert mean_of(replies, reference)["w"].item() == 2.0


def test_names_may_come_in_another_order() -> None:
    first = {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}
    second = {"b": torch.tensor([20.0]), "a": torch.tensor([3.0])}
    mean = mean_of([(first, 1), (second, 1)])
    assert (mean["a"].item(), mean["b"].item()) == (2.0, 15.0)


REFERENCE = {"bias": torch.zeros(2), "weight": torch.zeros(2, 3)}
GOOD = {"bias": torch.tensor([1.0, 2.0]), "weight": torch.ones(2, 3)}
# The faults are in the last tensor: an addition that went along the names would be half done.
REFUSALS: dict[str, tuple[dict[str, Tensor], int, list[str]]] = {
    "missing name": ({"bias": GOOD["bias"]}, 1, ["weight", "expected the 2 names", "missing"]),
    "no names": ({}, 1, ["weight", "bias", "expected the 2 names", "missing"]),
    "unknown name": (
        {**GOOD, "extra": torch.zeros(1)},
        1,
        ["extra", "expected the 2 names", "unknown"],
    ),
    "wrong shape": (
        {**GOOD, "weight": torch.ones(3, 2)},
        1,
        ["weight", "expected float32 of shape (2, 3)", "got float32 of shape (3, 2)"],
    ),
    "shape that would broadcast": (
        {**GOOD, "weight": torch.ones(1, 3)},
        1,
        ["weight", "expected float32 of shape (2, 3)", "got float32 of shape (1, 3)"],
    ),
    "wrong dtype": (
        {**GOOD, "weight": torch.ones(2, 3, dtype=torch.float64)},
        1,
        ["weight", "expected float32 of shape (2, 3)", "got float64 of shape (2, 3)"],
    ),
    "integers for floats": (
        {**GOOD, "weight": torch.ones(2, 3, dtype=torch.int64)},
        1,
        ["weight", "expected float32", "got int64"],
    ),
    "NaN": (
        {**GOOD, "weight": torch.tensor([[1.0, math.nan, 1.0], [1.0, 1.0, 1.0]])},
        1,
        ["weight", "expected finite values", "got 1 of 6"],
    ),
    "infinity": (
        {**GOOD, "weight": torch.tensor([[1.0, math.inf, 1.0], [-math.inf, 1.0, 1.0]])},
        1,
        ["weight", "expected finite values", "got 2 of 6"],
    ),
    "no examples": (GOOD, 0, ["num_examples", "expected at least 1", "got 0"]),
    "negative examples": (GOOD, -3, ["num_examples", "expected at least 1", "got -3"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_reply_names_the_fault_and_changes_nothing(case: str) -> None:
    state, num_examples, words = REFUSALS[case]
    fedavg, undisturbed = FedAvg(REFERENCE), FedAvg(REFERENCE)
    for mean in (fedavg, undisturbed):
        mean.add(GOOD, 3)
    with pytest.raises(ReplyError) as refusal:
        fedavg.add(state, num_examples)
    text = str(refusal.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert (fedavg.num_states, fedavg.num_examples) == (1, 3)
    assert bits(fedavg.result()) == bits(undisturbed.result())
    later = {"bias": torch.tensor([7.0, 1e-3]), "weight": torch.full((2, 3), 1e7)}
    for mean in (fedavg, undisturbed):
        mean.add(later, 11)
    assert bits(fedavg.result()) == bits(undisturbed.result())


def test_refused_first_reply_still_gives_the_reference() -> None:
    fedavg = FedAvg(REFERENCE)
    with pytest.raises(ReplyError):
        fedavg.add({**GOOD, "weight": torch.full((2, 3), math.nan)}, 1)
    assert bits(fedavg.result()) == bits(REFERENCE)


def test_check_state_accepts_equal_states_and_integer_buffers() -> None:
    check_state(GOOD, REFERENCE)
    check_state({"n": torch.tensor(3)}, {"n": torch.tensor(0)})


def test_counts_of_states_and_examples() -> None:
    fedavg = FedAvg(REFERENCE)
    assert (fedavg.num_states, fedavg.num_examples) == (0, 0)
    fedavg.add(GOOD, 3)
    fedavg.add(GOOD, 4)
    assert (fedavg.num_states, fedavg.num_examples) == (2, 7)
