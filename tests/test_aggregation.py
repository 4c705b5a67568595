"""FedAvg against exact fractions, NumPy, and Flower's own strategy."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from fedlib import FedAvg, ReplyError, enter_local_run

Replies = list[tuple[dict[str, Tensor], int]]

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)
FINITE_FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
WIDE_FLOATS = st.builds(
    lambda digits, exponent: digits * 2.0**exponent,
    st.integers(-(2**24), 2**24),
    st.integers(-50, 0),
)
"""Exact float32 values of either sign, up to 22 orders of magnitude apart."""


def mean_of(replies: Replies, reference: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    fedavg = FedAvg(replies[0][0] if reference is None else reference)
    for state, num_examples in replies:
        fedavg.add(state, num_examples)
    return fedavg.result()


def scalars(pairs: list[tuple[float, int]], dtype: torch.dtype = torch.float32) -> Replies:
    return [({"w": torch.tensor([value], dtype=dtype)}, n) for value, n in pairs]


def bits(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


@st.composite
def any_replies(draw: st.DrawFn) -> Replies:
    """One to six clients; one to three float tensors of any shape, 0-d and empty ones too."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_side=4), min_size=1, max_size=3))
    arrays = [hnp.arrays(dtype, shape, elements=st.floats(-1e4, 1e4, width=32)) for shape in shapes]
    return [
        (
            {f"layer{i}": torch.tensor(draw(array)) for i, array in enumerate(arrays)},
            draw(st.integers(1, 100_000)),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


@QUICK
@given(any_replies())
def test_mean_equals_numpys_and_flowers_own(replies: Replies) -> None:
    enter_local_run()  # gives messages a sender
    incoming = [
        Message(
            RecordDict(
                {"arrays": ArrayRecord(dict(state)), "metrics": MetricRecord({"num-examples": n})}
            ),
            reply_to=Message(RecordDict(), dst_node_id=2, message_type="train"),
        )
        for state, n in replies
    ]
    flowers, _ = FlowerFedAvg().aggregate_train(1, incoming)
    mean, weights = mean_of(replies), [n for _, n in replies]
    assert flowers is not None and set(flowers) == set(mean)
    for name, tensor in mean.items():
        stacked = np.stack([state[name].double().numpy() for state, _ in replies])
        scale, precision = np.abs(stacked).max(initial=0.0), torch.finfo(tensor.dtype).eps
        numpys = np.average(stacked, axis=0, weights=weights)
        tiny = 1e-15 * scale + 2e-45
        np.testing.assert_allclose(tensor.numpy(), numpys, rtol=precision, atol=tiny)
        # Flower adds in the tensors' own dtype, hence the tolerance.
        loose = 100 * precision * scale + 1e-40
        np.testing.assert_allclose(tensor.numpy(), flowers[name].numpy(), rtol=0, atol=loose)
        assert tensor.dtype == replies[0][0][name].dtype


@QUICK
@given(st.lists(st.tuples(WIDE_FLOATS, st.integers(1, 1_000)), min_size=2, max_size=5), st.data())
def test_order_of_replies_changes_no_bit(
    pairs: list[tuple[float, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(pairs))
    assert bits(mean_of(scalars(pairs))) == bits(mean_of(scalars(shuffled)))


def test_every_order_of_five_models_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(5)
    replies: Replies = []
    for client in range(5):
        magnitude = 10.0 ** torch.randint(-8, 9, (3, 7), generator=generator)
        weight = torch.randn(3, 7, generator=generator) * magnitude
        replies.append(({"weight": weight, "bias": weight[0].clone()}, 7 * client + 1))
    first, *others = (bits(mean_of(list(order))) for order in itertools.permutations(replies))
    assert len(others) == 119
    assert all(other == first for other in others)


@QUICK
@given(st.lists(st.tuples(FINITE_FLOAT32, st.integers(1, 60_000)), min_size=1, max_size=6))
def test_mean_of_any_finite_float32_is_off_by_rounding_only(
    pairs: list[tuple[float, int]],
) -> None:
    terms = [Fraction(value) * n for value, n in pairs]
    weight = sum(n for _, n in pairs)
    exact = sum(terms) / weight
    error = abs(Fraction(mean_of(scalars(pairs))["w"].item()) - exact)
    rounding = abs(exact) / 2**23 + Fraction(2) ** -149  # of one float32
    assert error <= rounding + sum(map(abs, terms)) / weight / 2**95


def test_a_mean_is_rounded_once_and_its_sums_do_not_overflow() -> None:
    # (1 * 1 + 2 * 2) / 3 = 5/3, to 10, 7 and 23 binary digits
    expected = {torch.float16: 1707 / 2**10, torch.bfloat16: 213 / 2**7}
    for dtype, rounded in {**expected, torch.float32: 13981013 / 2**23}.items():
        mean = mean_of(scalars([(1.0, 1), (2.0, 2)], dtype))["w"]
        assert (mean.dtype, mean.item()) == (dtype, rounded)
    pairs = [(60_000.0, 1_000), (49_952.0, 1_000)]
    assert mean_of(scalars(pairs, torch.float16))["w"].item() == 54_976.0
    assert mean_of(scalars([(1.0, 2**63 - 1), (3.0, 2**63 - 1)] * 2))["w"].item() == 2.0


def test_buffers_keep_their_dtypes_and_take_the_rounded_mean_or_the_majority() -> None:
    flags = torch.tensor([[True, True, False, True], [True, False, True, False]])
    replies: Replies = [
        ({"n": torch.tensor([10, -10, 0]), "b": torch.tensor(200).byte(), "flag": flags[0]}, 1),
        ({"n": torch.tensor([20, -20, 1]), "b": torch.tensor(250).byte(), "flag": flags[1]}, 2),
    ]
    mean = mean_of(replies)  # 50/3, -50/3, 2/3; 700/3; 1 against 2
    assert [tensor.dtype for tensor in mean.values()] == [torch.int64, torch.uint8, torch.bool]
    assert mean["n"].tolist() == [17, -17, 1]
    assert mean["b"].item() == 233
    assert mean["flag"].tolist() == [True, False, True, False]
    first, second = (dict(nn.BatchNorm1d(2).state_dict()) for _ in range(2))
    second = {name: tensor + 3 for name, tensor in second.items()}
    mean = mean_of([(first, 1), (second, 2)])
    assert mean["num_batches_tracked"].item() == 2
    assert mean["running_mean"].tolist() == [2.0, 2.0]


LARGE = {
    torch.int64: [2**62, -(2**63), 10**16 + 1, 1_790_000_000_123_456_789],
    torch.uint64: [2**63 + 5, 2**64 - 1, 0, 1],
    torch.complex64: [1 + 2j, 0.5 - 3.5j, 1e-30 + 1e30j, 0.1 + 0.2j],
}


@pytest.mark.parametrize("dtype", LARGE)
def test_large_integers_and_complex_numbers_are_exact(dtype: torch.dtype) -> None:
    state = {"many": torch.tensor(LARGE[dtype], dtype=dtype)}
    state["one"] = state["many"][0].clone()
    assert bits(mean_of([(state, 3), (state, 7), (state, 10**12)])) == bits(state)
    others = state | {"many": torch.tensor(LARGE[dtype][::-1], dtype=dtype)}
    mean = mean_of([(state, 1), (others, 2)])["many"].tolist()
    pairs = zip(state["many"].tolist(), others["many"].tolist(), strict=True)
    if dtype is torch.complex64:
        expected = torch.tensor([(a + 2 * b) / 3 for a, b in pairs], dtype=dtype).tolist()
        assert mean == pytest.approx(expected, rel=1e-6)
    else:
        assert mean == [round(Fraction(a + 2 * b, 3)) for a, b in pairs]


@QUICK
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_side=4),
        elements=FINITE_FLOAT32.filter(lambda v: math.copysign(1, v) > 0 or v != 0),
    ),
    st.integers(1, 1_000_000),
)
def test_a_single_reply_comes_back_bit_for_bit(values: np.ndarray, num_examples: int) -> None:
    state = {"w": torch.tensor(values), "n": torch.arange(-5, 5), "flag": torch.arange(2) == 0}
    state |= {"half": torch.linspace(-3, 3, 101).half()}
    assert bits(mean_of([(state, num_examples)])) == bits(state)


def test_the_reference_has_no_weight_and_its_names_no_order() -> None:
    reference = {"a": torch.tensor([1e6]), "b": torch.tensor([1e6])}
    first = {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}
    second = {"b": torch.tensor([-2.0]), "a": torch.tensor([5.0])}
    mean = mean_of([(first, 1), (second, 3)], reference)
    assert (mean["a"].item(), mean["b"].item()) == (4.0, 1.0)
    assert list(mean) == ["a", "b"]


def test_results_share_no_memory_with_anything() -> None:
    state = {"w": torch.tensor([2.0])}
    fedavg = FedAvg(state)
    fedavg.result()["w"].fill_(77.0)  # without replies, a copy of the reference
    assert state["w"].item() == 2.0
    fedavg.add(state, 1)
    state["w"].fill_(99.0)
    fedavg.result()["w"].fill_(77.0)
    assert fedavg.result()["w"].item() == 2.0


REFERENCE = {"n": torch.tensor(0), "bias": torch.zeros(2), "weight": torch.zeros(2, 3)}
GOOD = {"n": torch.tensor(3), "bias": torch.ones(2), "weight": torch.ones(2, 3)}
WANTED = "weight: expected float32 of shape (2, 3), got "
NOT_FINITE = torch.tensor([[1.0, math.nan, 1.0], [math.inf, -math.inf, 1.0]])
# The faults are in the last tensor: an addition that went along the names would be half done.
REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "missing name": ({"weight": None}, 1, "expected the global model's names, got missing"),
    "broadcast": ({"weight": torch.ones(1, 3)}, 1, WANTED + "float32 of shape (1, 3)"),
    "float64": ({"weight": torch.ones(2, 3).double()}, 1, WANTED + "float64 of shape (2, 3)"),
    "not finite": ({"weight": NOT_FINITE}, 1, "weight: expected finite values, got 3 of 6"),
    "no examples": ({}, 0, "num_examples: expected at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_reply_names_the_fault_and_changes_nothing(case: str) -> None:
    changes, num_examples, words = REFUSALS[case]
    state = {name: tensor for name, tensor in {**GOOD, **changes}.items() if tensor is not None}
    fedavg, undisturbed = FedAvg(REFERENCE), FedAvg(REFERENCE)
    later = {**GOOD, "weight": torch.full((2, 3), 1e7)}
    for num_states, good in enumerate((GOOD, later)):
        with pytest.raises(ReplyError) as refusal:
            fedavg.add(state, num_examples)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        assert fedavg.num_states == num_states
        assert bits(fedavg.result()) == bits(undisturbed.result())
        for mean in (fedavg, undisturbed):
            mean.add(good, 3)
    assert (fedavg.num_states, fedavg.num_examples) == (2, 6)
    assert bits(fedavg.result()) == bits(undisturbed.result())
