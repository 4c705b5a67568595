"""FedAvgM and FedAdam: by hand in one dimension, and with Flower's own strategies."""

import io
from functools import partial
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flowers

from course.checks.loop import fedavgm_step
from course.labs.one_more_record import (
    FLOWER_KEYS,
    averaging,
    largest_difference,
    make_app,
    round_by_round,
    with_flowers_own,
)
from fedlib import Config, LocalGrid, State, run, state_hash
from fedlib.algorithms.server_optimizers import fedadam, fedavgm
from fedlib.server_app import ServerStep

NUM_NODES = 3
CONFIG = Config()


def follow(step: ServerStep, changes: list[float]) -> list[float]:
    """Weights after rounds whose mean differs from the model by these changes."""
    model: State = {"w": torch.tensor([1.0], dtype=torch.float64)}
    memory: State = {}
    seen = []
    for change in changes:
        model, memory = step(CONFIG, model, {"w": model["w"] + change}, memory)
        seen.append(model["w"].item())
    return seen


def test_fedavgm_by_hand() -> None:
    # velocities 2, 0.5 * 2 + 1 = 2, 0.5 * 2 - 1 = 0; half of each is a step
    step = fedavgm(momentum=0.5, learning_rate=0.5)
    assert follow(step, [2.0, 1.0, -1.0]) == pytest.approx([2.0, 3.0, 3.0])


def test_fedadam_by_hand() -> None:
    # round 1: m = 0.1 * 2, v = 0.01 * 4; corrected with the powers of 2
    rate = 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    first = 1 + rate * 0.2 / (0.2 + 0.5)
    # round 2: m = 0.9 * 0.2 + 0.1 * 1, v = 0.99 * 0.04 + 0.01 * 1
    rate = 0.1 * (1 - 0.99**3) ** 0.5 / (1 - 0.9**3)
    second = first + rate * 0.28 / (0.0496**0.5 + 0.5)
    assert follow(fedadam(learning_rate=0.1, tau=0.5), [2.0, 1.0]) == pytest.approx([first, second])


def test_fedavgm_is_the_step_of_notebook_09_and_without_momentum_fedavg() -> None:
    changes = [0.3, -0.2, 0.7]
    assert follow(fedavgm(0.9), changes) == pytest.approx(follow(fedavgm_step, changes))
    assert follow(fedavgm(0.0), changes) == pytest.approx([1.3, 1.1, 1.8])


@pytest.fixture
def config(small_config: Config) -> Config:
    """A run of three rounds in which all nodes train."""
    values = small_config.to_run_config() | {
        "num-server-rounds": 3,
        "fraction-clients-train": 1.0,
        "learning-rate-schedule": "constant",
        "momentum": 0.0,
    }
    return Config.from_run_config(values)


CASES: dict[str, tuple[ServerStep, Any]] = {
    "FedAvgM": (
        fedavgm(0.7, 0.8),
        partial(flowers.FedAvgM, server_momentum=0.7, server_learning_rate=0.8),
    ),
    "FedAvgM without momentum": (fedavgm(0.0), partial(flowers.FedAvgM, server_momentum=0.0)),
    "FedAdam": (
        fedadam(learning_rate=0.02, tau=1e-2),
        partial(flowers.FedAdam, eta=0.02, tau=0.01),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flowers_own_strategy_ends_with_the_same_weights(config: Config, name: str) -> None:
    step, strategy = CASES[name]
    first, *theirs = with_flowers_own(strategy(**FLOWER_KEYS), config, NUM_NODES)
    ours = round_by_round([first, *theirs], config, NUM_NODES, step, mu=None)
    assert len(ours) == 3
    for mine, their in zip(ours, theirs, strict=True):
        assert largest_difference(mine, first) > 1e-3
        assert largest_difference(mine, their) < 1e-6


@pytest.mark.parametrize("step", [fedavgm(), fedadam()], ids=["fedavgm", "fedadam"])
def test_a_memory_survives_the_file_and_nothing_given_is_changed(step: ServerStep) -> None:
    model, mean = ({"w": torch.tensor([x, 2.0])} for x in (1.0, 3.0))
    _, memory = step(CONFIG, model, mean, {})
    buffer = io.BytesIO()
    torch.save(dict(memory), buffer)
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    before = [state_hash(state) for state in (model, mean, memory)]
    following, _ = step(CONFIG, model, mean, memory)
    assert before == [state_hash(state) for state in (model, mean, memory)]
    assert state_hash(following) == state_hash(step(CONFIG, model, mean, kept)[0])


def test_it_is_a_step_for_fedlibs_own_loop(config: Config) -> None:
    step = fedadam(learning_rate=0.01)
    *_, (last, _) = averaging(LocalGrid(make_app(config), NUM_NODES), config, step)
    assert state_hash(run(LocalGrid(make_app(config), NUM_NODES), config, step)) == state_hash(last)
