"""The learning rate of each round, by hand."""

from typing import Any

import pytest

from fedlib.schedule import SCHEDULES, learning_rate


def rates(schedule: str, num_rounds: int, **options: Any) -> list[float]:
    return [
        learning_rate(r, num_rounds, initial=0.8, schedule=schedule, **options)
        for r in range(1, num_rounds + 1)
    ]


def test_constant_stays() -> None:
    assert rates("constant", 4) == [0.8, 0.8, 0.8, 0.8]


def test_step_halves_after_every_second_round() -> None:
    expected = [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1]
    assert rates("step", 7, decay=0.5, step_size=2) == pytest.approx(expected, rel=1e-15)


def test_step_default_halves_after_round_five_and_ten() -> None:
    values = rates("step", 11)
    assert values[:5] == [0.8] * 5
    assert values[5:10] == [0.4] * 5
    assert values[10] == 0.2


def test_exponential_spreads_the_decay_over_the_step_size() -> None:
    # A quarter in two rounds is a half each round.
    expected = [0.8, 0.4, 0.2, 0.1, 0.05]
    assert rates("exponential", 5, decay=0.25, step_size=2) == pytest.approx(expected, rel=1e-12)


def test_exponential_meets_step_at_every_step() -> None:
    step, exponential = rates("step", 16), rates("exponential", 16)
    for index in (0, 5, 10, 15):
        assert exponential[index] == pytest.approx(step[index], rel=1e-12)
    assert exponential[1] < step[1]


def test_cosine_by_hand() -> None:
    # cos is 1, 1/sqrt(2), 0, -1/sqrt(2), -1 at the five rounds; from 0.8 to a tenth of it.
    half_root = 0.5**0.5
    expected = [0.08 + 0.72 * (1 + c) / 2 for c in (1, half_root, 0, -half_root, -1)]
    assert rates("cosine", 5) == pytest.approx(expected, rel=1e-12)
    assert expected[0] == pytest.approx(0.8)
    assert expected[2] == pytest.approx(0.44)
    assert expected[-1] == pytest.approx(0.08)


def test_cosine_ends_with_the_fraction_asked_for() -> None:
    assert rates("cosine", 9, final_fraction=0.25)[-1] == pytest.approx(0.2, rel=1e-12)
    assert rates("cosine", 9, final_fraction=0.0)[-1] == pytest.approx(0.0, abs=1e-15)


def test_exponential_is_the_default() -> None:
    assert learning_rate(4, 7, initial=0.8) == rates("exponential", 7)[3]


def test_only_cosine_looks_at_the_length_of_the_run() -> None:
    for schedule in SCHEDULES:
        short = learning_rate(3, 5, initial=0.8, schedule=schedule)
        long = learning_rate(3, 50, initial=0.8, schedule=schedule)
        assert (short == long) == (schedule != "cosine")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_round_uses_the_initial_rate(schedule: str) -> None:
    assert rates(schedule, 1) == [0.8]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_starts_at_initial_and_never_rises(schedule: str) -> None:
    values = rates(schedule, 12)
    assert values[0] == 0.8
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_round_gives_the_same_rate_in_any_order(schedule: str) -> None:
    forwards = [learning_rate(r, 6, initial=0.3, schedule=schedule) for r in range(1, 7)]
    backwards = [learning_rate(r, 6, initial=0.3, schedule=schedule) for r in range(6, 0, -1)]
    assert forwards == backwards[::-1]


def test_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"schedule: expected one of .*, got 'linear'") as error:
        learning_rate(1, 2, initial=0.1, schedule="linear")
    for schedule in ("constant", "step", "exponential", "cosine"):
        assert schedule in str(error.value)
