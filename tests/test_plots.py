"""The figures show what results.json holds."""

import json
from pathlib import Path

import matplotlib
import pytest

from fedlib import (
    WAITING,
    Config,
    LocalGrid,
    Span,
    federated_dataset,
    load_results,
    make_client_app,
    plot_metrics,
    plot_partitions,
    plot_timeline,
    run,
)

matplotlib.use("Agg")


@pytest.fixture
def results(small_config: Config) -> dict:
    run(LocalGrid(make_client_app(small_config), 4), small_config)
    return load_results(next(Path(small_config.output_dir).glob("*/*")))


def test_the_curves_are_the_numbers_of_results_json(results: dict) -> None:
    figure = plot_metrics(results)
    accuracy, loss, rate = figure.axes
    rounds = results["rounds"]
    central = next(line for line in accuracy.lines if line.get_label() == "central test set")
    assert list(central.get_ydata()) == [100 * r["centralized_accuracy"] for r in rounds]
    assert list(loss.lines[1].get_ydata()) == [r["federated_evaluate_loss"] for r in rounds]
    assert list(rate.lines[0].get_ydata()) == [r["learning_rate"] for r in rounds]
    for axes in figure.axes:
        assert axes.get_xlabel() == "round"
        assert axes.get_ylabel()
        assert axes.get_title(loc="left")


def test_rounds_without_a_value_leave_a_gap_and_no_error(results: dict) -> None:
    gap = json.loads(json.dumps(results))
    for key in ("accuracy", "accuracy_std", "loss", "loss_std"):
        gap["rounds"][0][f"federated_evaluate_{key}"] = None
    accuracy = plot_metrics(gap).axes[0]
    federated = accuracy.lines[1]
    assert list(federated.get_xdata()) == [2]


def test_the_partition_picture_counts_every_example(small_folder: Path) -> None:
    partitioner = federated_dataset(str(small_folder), 4, 1.0, 42).partitioners["train"]
    axes = plot_partitions(partitioner, "four").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 1_200
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-1] == "T - shirt / top"
    assert labels[0] == "Ankle boot"


def test_a_timeline_has_a_lane_for_each_and_a_bar_for_each_span() -> None:
    spans = [
        Span("server", 0.0, 1.0, "sample"),
        Span("node 7", 1.0, 5.0, WAITING),
        Span("node 7", 2.0, 4.0, "TRAIN"),
        Span("server", 5.0, 6.0, "aggregate"),
    ]
    (axes,) = plot_timeline(spans, "One node").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["server", "node 7"]
    bars = [(b.get_x(), b.get_x() + b.get_width(), b.get_center()[1]) for b in axes.patches]
    assert bars == [(0, 1, 0), (1, 5, 1), (2, 4, 1), (5, 6, 0)]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first lane is on top
    looks = {(b.get_facecolor(), b.get_hatch()) for b in axes.patches}
    assert len(looks) == 4  # each kind has its own, in colour and hatch
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend) == ["TRAIN", "aggregate", "sample", "waiting"]


def test_a_timeline_of_nothing_is_empty_and_no_error() -> None:
    assert plot_timeline([], "Nothing").axes[0].patches[:] == []
