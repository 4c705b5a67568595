"""What the labs' experiments share: intervals, two processes, saved results."""

import json
import os
from pathlib import Path

import pytest
import torch
from scipy import stats

import labs as labs_tool
from course import labs
from fedlib import Stream, clone_state, make_model, open_dataset, partition_indices, torch_generator


def test_an_interval_is_that_of_a_paired_t_test() -> None:
    variant, baseline = [70.1, 71.5, 69.0, 73.2, 70.0], [69.0, 71.0, 69.5, 71.0, 69.9]
    found = labs.interval([a - b for a, b in zip(variant, baseline, strict=True)])
    wanted = stats.ttest_rel(variant, baseline).confidence_interval(confidence_level=0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.mean == pytest.approx(0.68)
    assert str(labs.interval([1, 2, 3, 4, 5])) == "+3.00 [+1.04, +4.96]"


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_value_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"expected two values or more, got {len(values)}"):
        labs.interval(values)


def test_the_labs_images_are_the_same_folder_in_every_process_and_fill_fifty_nodes() -> None:
    name = labs.small_dataset()
    dataset = open_dataset(name)
    sizes = [len(part) for part in partition_indices(dataset, 50, 0.1, labs.SEEDS[0])]
    assert sum(sizes) == labs.NUM_TRAIN and min(sizes) >= 10
    assert {path.suffix for path in Path(name).iterdir()} == {".parquet"}
    state = clone_state(make_model(dataset, torch_generator(1, 0, -1, Stream.MODEL)))
    assert 2 < labs.accuracy(state, dataset) < 30  # untrained


def test_cases_run_in_other_processes_on_one_thread_and_come_back_in_order() -> None:
    rows = labs.run_all(square, [3, 1, 2])
    assert [row[0] for row in rows] == [9, 1, 4]
    assert os.getpid() not in {row[1] for row in rows} and {row[2] for row in rows} == {1}


def square(number: int) -> tuple[int, int, int]:
    return number**2, os.getpid(), torch.get_num_threads()


def test_what_is_saved_is_loaded_again_and_says_what_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs, "RESULTS", tmp_path / "new")
    path = labs.save("masks", {"accuracy": [1.5, 2.0]}, 3.4)
    assert labs.load("masks") == {"accuracy": [1.5, 2.0]}
    made = json.loads(path.read_text("utf-8"))["made"]
    assert made["seconds"] == 3 and set(made["versions"]) == {"flwr", "torch"}


def test_an_unknown_experiment_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^labs: expected names of .*, got no_such$"):
        labs_tool.main(["no_such"])


def test_every_experiment_has_its_results_and_only_those_are_there() -> None:
    assert {path.stem for path in labs.RESULTS.glob("*")} == set(labs_tool.names())
