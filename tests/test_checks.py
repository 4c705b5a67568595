"""The exercises' checks: the solution passes, plausible wrong answers fail with a helpful word."""

from typing import Any

import pytest

from fedlib import checks

Answer = Any
Wrong = tuple[Answer, str]
"""A plausible wrong answer, and a part of the line that it must get."""

CASES: dict[str, tuple[Answer, list[Wrong]]] = {}
"""By the check's name: the right answer, and at least two wrong ones."""

# --- 00 Start here


# --- 01 Fifty clients, fifty data sets


# --- 02 The model and its local training


# --- 03 Messages and records


# --- 04 The ClientApp


# --- 05 The ServerApp: one round


# --- 06 Aggregation


# --- 07 Query and opt-in


# --- 08 The round loop


# --- 09 Tracking and plots


# --- the tests

NAMES = sorted(
    name
    for name, value in vars(checks).items()
    if callable(value) and value.__module__ == "fedlib.checks"
)


def verdict(name: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> str:
    getattr(checks, name)(answer)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    return line


def test_every_check_is_tested_with_two_wrong_answers() -> None:
    assert sorted(CASES) == NAMES
    assert all(len(wrong) >= 2 for _, wrong in CASES.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(name, CASES[name][0], capsys).startswith("✅")


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name in NAMES for wrong in CASES[name][1]]
)
def test_a_wrong_answer_fails_and_hears_why(
    name: str, wrong: Wrong, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(name, wrong[0], capsys)
    assert line.startswith("❌")
    assert wrong[1] in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stub", [None, ..., lambda *_, **__: None, lambda *_, **__: ...])
def test_an_untouched_stub_is_not_yet(
    name: str, stub: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, stub, capsys).startswith("⏳")
