"""Notebook 13's experiment: what was saved, and a case of it computed anew."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from course.labs import SEEDS, load
from course.labs.one_more_record import (
    ALPHAS,
    CHOSEN,
    EVERY,
    GRID,
    ROUNDS,
    TUNING_SEED,
    Case,
    late,
    run_case,
)


@pytest.fixture(scope="module")
def saved() -> Any:
    return load("one_more_record")


def test_every_arm_has_five_seeds_in_every_situation(saved: Any) -> None:
    counts = Counter((r["arm"], r["alpha"], r["epochs"]) for r in saved["runs"])
    assert set(counts.values()) == {len(SEEDS)} and len(SEEDS) >= 5
    assert set(counts) == {(arm, a, e) for arm in GRID for a in ALPHAS for e in ROUNDS}
    for run in saved["runs"]:
        assert len(run["accuracy"]) == ROUNDS[run["epochs"]] // EVERY[run["epochs"]]
        assert len(run["megabytes"]) == len(run["accuracy"])


def test_settings_are_the_best_on_a_seed_that_is_not_reported(saved: Any) -> None:
    assert TUNING_SEED not in SEEDS
    for arm, tried in GRID.items():
        rows = [row["accuracy"] for row in saved["tuning"] if row["arm"] == arm]
        assert len(tried) == 1 or CHOSEN[arm] == int(np.argmax(rows))


def test_messages_weigh_the_same_save_scaffolds_which_weigh_double(saved: Any) -> None:
    total = {(r["arm"], r["epochs"]): r["megabytes"][-1] for r in saved["runs"]}
    for (arm, epochs), megabytes in total.items():
        factor = 2 if arm == "SCAFFOLD" else 1
        assert megabytes == pytest.approx(factor * total["FedAvg", epochs], rel=2e-3)


def test_a_case_computed_anew_is_what_was_saved(saved: Any) -> None:
    again = run_case(Case("SCAFFOLD", 1.0, 1, 1, 0), num_rounds=2)
    key = ("SCAFFOLD", 1.0, 1, 1)
    [run] = [r for r in saved["runs"] if (r["arm"], r["alpha"], r["epochs"], r["seed"]) == key]
    assert again["accuracy"] == pytest.approx(run["accuracy"][:1], abs=0.5)
    # The name of the data set, which messages carry, is a path here.
    assert again["megabytes"] == pytest.approx(run["megabytes"][:1], rel=1e-3)


def test_the_second_half_of_a_run_and_of_its_first_half() -> None:
    case = {"accuracy": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]}
    assert late(case) == 65 and late(case, 0.5) == 35
