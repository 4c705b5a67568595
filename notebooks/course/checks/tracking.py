"""Notebook 10: runs compared."""

from dataclasses import asdict

import numpy as np

from course.verdict import Answer, check, expect, on_error
from fedlib.run_directory import Round, Stage


@check
def price_of_a_target(answer: Answer) -> None:
    """The first round that reaches an accuracy, and the megabytes until then."""
    curve = zip((3, 4, 5, 6, 7), (0.3, None, 0.6, 0.5, 0.7), (1, 1, 2, 4, 8), strict=True)
    rounds = []
    for number, accuracy, megabytes_sent in curve:
        train = Stage(bytes_sent=megabytes_sent * 10**6, bytes_received=5 * 10**5)
        rounds.append(asdict(Round(number, 0.05, centralized_accuracy=accuracy, train=train)))
    case = "rounds 3 to 7 with 0.3, None, 0.6, 0.5, 0.7; 1.5, 1.5, 2.5 ... MB"
    hint = "Is it the first that is good enough, with what all rounds up to it cost?"
    slips = {
        "What is the round's own `server_round`?": (3, 5.5),
        "Do rounds count from 0?": (2, 5.5),
    }
    with on_error(TypeError, "In a round without a measurement the accuracy is None."):
        expect(f"target 0.6 of {case}", answer(rounds, 0.6), (5, 5.5), hint, slips)
    got = answer(rounds[1:3], 0.0)
    expect(f"target 0 of rounds 4 and 5 of {case}", got, (5, 4.0), "Is None an accuracy?")
    got = answer(rounds, 0.9)
    got = repr(tuple(got) if isinstance(got, list) else got)
    expect("target 0.9", got, "(None, None)", "What if none gets there?")


@check
def paired_difference(answer: Answer) -> None:
    """Mean and standard error of the differences, seed by seed."""
    a, b = {1: 60.0, 2: 70.0, 3: 50.0, 4: 10.0}, {3: 45.0, 1: 59.0, 2: 67.0, 5: 99.0}
    with on_error(KeyError, "Not every run is there: what about such a seed?"):
        got = answer(a, b)
    case, pair = "differences 1, 3, 5 at seeds 1, 2, 3", got if got in (None, ...) else len(got)
    expect("how many numbers are returned", pair, 2)
    hint = "Is there one difference, a - b, for each seed that both have?"
    expect(f"{case}, mean", got[0], 3.0, hint)
    hint = "Of the differences: did you divide by n - 1, and then by the root of n?"
    unpaired = np.std([60, 70, 50], ddof=1) ** 2 + np.std([45, 59, 67], ddof=1) ** 2
    slips = {"Is that the error of the differences, seed by seed?": (unpaired / 3) ** 0.5}
    expect(f"{case}, error", got[1], 2 / 3**0.5, hint, slips)
