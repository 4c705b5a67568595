"""SCAFFOLD: against NumPy on quadratics, its first round, its sum, and what it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from course.labs.one_more_record import (
    averaging,
    first_model,
    make_app,
    num_examples,
    scaffold,
)
from fedlib import (
    Config,
    FedlibError,
    LocalGrid,
    ReplyError,
    make_model,
    open_dataset,
    state_hash,
)
from fedlib.algorithms.messages import OWN_CONTROL, SCAFFOLD, ScaffoldReply, ScaffoldRequest
from fedlib.algorithms.scaffold import ScaffoldMean, load_own_control, local_round, zero_control
from fedlib.messages import encode

# Four nodes in two dimensions: the loss 1/2 (x - b)' A (x - b), and how much each of them weighs.
A = np.array([[[1.0, 0.2], [0.2, 0.5]], [[3.0, 0], [0, 0.3]], [[0.4, 0], [0, 2]], [[1, -0.3]] * 2])
A[3] = [[1.0, -0.3], [-0.3, 1.5]]
B = np.array([[1.0, 0.0], [-2.0, 3.0], [0.5, -1.0], [4.0, 2.0]])
WEIGHTS = (1, 3, 2, 5)
RATE, STEPS = 0.1, 7


class Point(nn.Module):
    def __init__(self, x: np.ndarray) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.from_numpy(x.copy()))


def training(point: Point, node: int) -> Callable[[], None]:
    a, b = torch.from_numpy(A[node]), torch.from_numpy(B[node])
    optimizer = torch.optim.SGD(point.parameters(), lr=RATE)

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            ((point.x - b) @ a @ (point.x - b) / 2).backward()
            optimizer.step()

    return train


def by_numpy(samples: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 with option II and weights, in NumPy."""
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    p = np.array(WEIGHTS, dtype=float)
    for chosen in samples:
        dx, dc = np.zeros(2), np.zeros(2)
        for i in chosen:
            y = x.copy()
            for _ in range(STEPS):
                y -= RATE * (A[i] @ (y - B[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * RATE)
            dx += p[i] / p[chosen].sum() * (y - x)
            dc += p[i] / p.sum() * (new - own[i])
            own[i] = new
        x, c = x + dx, c + dc
    return x, c


def by_fedlib(samples: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    model: Any = {"x": torch.zeros(2, dtype=torch.float64)}
    control = zero_control(Point(np.zeros(2)))
    own = {i: zero_control(Point(np.zeros(2))) for i in range(4)}
    for chosen in samples:
        mean = ScaffoldMean(model, control)
        for i in chosen:
            point = Point(model["x"].numpy())
            new = local_round(point, training(point, i), control, own[i], STEPS, RATE)
            change = {"x": new["x"] - own[i]["x"]}
            own[i] = dict(new)
            mean.add(ScaffoldReply(point.state_dict(), WEIGHTS[i], 0.0, 1, change), WEIGHTS[i])
        model, control = mean.result(sum(WEIGHTS))  # type: ignore[assignment]
    return model["x"].numpy(), control["x"].numpy()


def test_on_a_quadratic_it_is_the_algorithm_in_numpy() -> None:
    rng = np.random.default_rng(3)
    samples = [sorted(rng.choice(4, size=2, replace=False)) for _ in range(30)]
    for mine, theirs in zip(by_fedlib(samples), by_numpy(samples), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_on_a_quadratic_it_finds_the_minimum_which_fedavg_misses() -> None:
    p = np.array(WEIGHTS) / sum(WEIGHTS)
    minimum = np.linalg.solve(np.einsum("i,ijk->jk", p, A), np.einsum("i,ijk,ik->j", p, A, B))
    x, control = by_fedlib([[0, 1, 2, 3]] * 200)
    np.testing.assert_allclose(x, minimum, atol=1e-6)
    np.testing.assert_allclose(control, 0, atol=1e-6)  # the mean gradient at the minimum
    fedavg = np.zeros(2)
    for _ in range(200):
        ends = []
        for i in range(4):
            y = fedavg.copy()
            for _ in range(STEPS):
                y -= RATE * A[i] @ (y - B[i])
            ends.append(y)
        fedavg = p @ np.array(ends)
    assert np.abs(fedavg - minimum).max() > 0.05


@pytest.fixture
def config(small_config: Config) -> Config:
    """Three rounds, in which a half of the nodes train."""
    values = small_config.to_run_config() | {
        "num-server-rounds": 3,
        "momentum": 0.0,
        "dirichlet-alpha": 0.5,
    }
    return Config.from_run_config(values)


def test_with_control_variates_of_zero_a_round_is_fedavgs_to_the_bit(config: Config) -> None:
    grids = [LocalGrid(make_app(config), 4) for _ in range(2)]
    (fedavg, _), (ours, _) = next(averaging(grids[0], config)), next(scaffold(grids[1], config))
    assert state_hash(fedavg) == state_hash(ours)


def test_the_servers_control_variate_is_the_mean_of_the_nodes_own(config: Config) -> None:
    grid, sent = LocalGrid(make_app(config), 4), list[Any]()
    push = grid.push_messages
    grid.push_messages = lambda m: push(sent.extend(m := list(m)) or m)  # type: ignore
    zeros = zero_control(make_model(open_dataset(config.dataset), torch.Generator()))
    total, mean = sum(num_examples(config, 4)), {name: zeros[name].double() for name in zeros}
    rounds = scaffold(grid, config)
    next(rounds), next(rounds)
    replies = {n: context.state for n, context in grid.contexts.items()}
    assert any(OWN_CONTROL in state for state in replies.values())
    for node_id, state in replies.items():
        n = num_examples(config, 4)[node_id - 2]
        own = load_own_control(state, zeros)
        mean = {name: mean[name] + n / total * own[name].double() for name in mean}
    next(rounds)
    last = [m for m in sent if m.metadata.message_type == SCAFFOLD][-1]
    control = last.content["control"].to_torch_state_dict()
    for name in mean:
        torch.testing.assert_close(control[name].double(), mean[name], rtol=1e-4, atol=1e-6)


def test_it_costs_twice_as_much_as_fedavg(config: Config) -> None:
    grids = [LocalGrid(make_app(config), 4) for _ in range(2)]
    (_, fedavg), (_, ours) = next(averaging(grids[0], config)), next(scaffold(grids[1], config))
    assert 1.99 < ours / fedavg < 2


def answered(config: Config, control: Any) -> Message:
    model = first_model(config)
    content = encode(ScaffoldRequest(model, 1, config.dataset, 0.05, control))
    grid = LocalGrid(make_app(config), 4)
    [reply] = grid.send_and_receive([Message(content, 2, SCAFFOLD)])
    assert OWN_CONTROL not in grid.contexts[2].state
    return reply


def test_momentum_on_the_nodes_is_refused_in_one_line(config: Config) -> None:
    with_momentum = Config.from_run_config(config.to_run_config() | {"momentum": 0.9})
    reply = answered(with_momentum, first_model(config))
    assert reply.error.reason.startswith("run config: momentum: expected 0 with SCAFFOLD")
    assert "\n" not in reply.error.reason


def test_a_control_variate_of_another_kind_is_refused_and_nothing_is_kept(config: Config) -> None:
    control = first_model(config)
    reply = answered(config, {**control, "fc2.bias": torch.zeros(3)})
    expected = "control variate: fc2.bias: expected float32 of shape (10,), got float32 of shape"
    assert reply.error.reason.startswith(expected)
    reply = answered(config, {k: t for k, t in control.items() if k != "fc2.bias"})
    assert reply.error.reason.startswith("control variate: expected the global model's names")


def test_a_reply_with_a_bad_control_variate_changes_neither_mean() -> None:
    state = {"x": torch.zeros(2)}
    mean = ScaffoldMean(state, state)
    good = ScaffoldReply({"x": torch.ones(2)}, 1, 0.0, 1, {"x": torch.ones(2)})
    mean.add(good, 1)
    for bad in (torch.full((2,), torch.nan), torch.zeros(3)):
        with pytest.raises(ReplyError, match=r"^control variate: x: expected"):
            mean.add(ScaffoldReply({"x": 5 * torch.ones(2)}, 1, 0.0, 1, {"x": bad}), 1)
    with pytest.raises(FedlibError):
        mean.add(ScaffoldReply({"x": torch.full((2,), torch.nan)}, 1, 0.0, 1, good.control), 1)
    model, control = mean.result(4)
    assert model["x"].tolist() == [1, 1] and control["x"].tolist() == [0.25, 0.25]


def test_without_any_reply_both_stay() -> None:
    model, control = ScaffoldMean({"x": torch.ones(1)}, {"x": torch.ones(1)}).result(4)
    assert model["x"].item() == control["x"].item() == 1
