"""The learning rate of each round, by hand."""

from typing import Any

import pytest

from fedlib import SCHEDULES, learning_rate


def rates(schedule: str, num_rounds: int, **options: Any) -> list[float]:
    return [
        learning_rate(r, num_rounds, initial=0.8, schedule=schedule, **options)
        for r in range(1, num_rounds + 1)
    ]


# cos is 1, 1/sqrt(2), 0, -1/sqrt(2), -1 at the five rounds
COSINE = [0.08 + 0.72 * (1 + c) / 2 for c in (1, 0.5**0.5, 0, -(0.5**0.5), -1)]


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, [0.8, 0.8, 0.8, 0.8]),
        ("step", {"decay": 0.5, "step_size": 2}, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1]),
        ("step", {}, [0.8] * 5 + [0.4] * 5 + [0.2]),
        # A quarter in two rounds is a half each round.
        ("exponential", {"decay": 0.25, "step_size": 2}, [0.8, 0.4, 0.2, 0.1, 0.05]),
        ("exponential", {}, [0.8 * 0.5 ** (r / 5) for r in range(11)]),
        ("cosine", {}, COSINE),
        ("cosine", {"final_fraction": 0.5}, [0.8, 0.6, 0.4]),
        ("cosine", {"final_fraction": 0.0}, [0.8, 0.4, 0.0]),
    ],
)
def test_rates_by_hand(schedule: str, options: dict[str, Any], expected: list[float]) -> None:
    came = rates(schedule, len(expected), **options)
    assert came == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_start_at_initial_never_rise_and_depend_on_the_round_alone(schedule: str) -> None:
    assert rates(schedule, 1) == [0.8]
    values = rates(schedule, 12)
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.8 and values[-1] > 0
    backwards = [learning_rate(r, 12, initial=0.8, schedule=schedule) for r in range(12, 0, -1)]
    assert backwards == values[::-1]
    same_in_a_longer_run = rates(schedule, 50)[:12] == values
    assert same_in_a_longer_run == (schedule != "cosine")  # a stopped run may be made longer
