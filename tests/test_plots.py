"""The figures show what results.json holds."""

from pathlib import Path

import datasets
import matplotlib
from flwr_datasets.partitioner import IidPartitioner

from course import WAITING, Span, plot_metrics, plot_partitions, plot_timeline
from fedlib import Config, LocalGrid, load_results, make_client_app, run

matplotlib.use("Agg")


def test_the_curves_are_the_numbers_of_results_json(small_config: Config) -> None:
    run(LocalGrid(make_client_app(small_config), 4), small_config)
    results = load_results(next(Path(small_config.output_dir).glob("*/*")))
    rounds = results["rounds"]
    figure = plot_metrics(results)
    accuracy, loss, rate = figure.axes
    central = next(line for line in accuracy.lines if line.get_label() == "central test set")
    assert list(central.get_ydata()) == [100 * r["centralized_accuracy"] for r in rounds]
    assert list(loss.lines[1].get_ydata()) == [r["federated_evaluate_loss"] for r in rounds]
    assert list(rate.lines[0].get_ydata()) == [r["learning_rate"] for r in rounds]
    assert all(axes.get_xlabel() == "round" and axes.get_ylabel() for axes in figure.axes)

    for key in ("accuracy", "accuracy_std", "loss", "loss_std"):  # nobody evaluated
        rounds[0][f"federated_evaluate_{key}"] = None
    assert list(plot_metrics(results).axes[0].lines[1].get_xdata()) == [2]


def test_the_partition_picture_counts_every_example(small_folder: Path) -> None:
    partitioner = IidPartitioner(4)
    partitioner.dataset = datasets.load_dataset(str(small_folder), split="train")
    axes = plot_partitions(partitioner, "four").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 1_200
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert (labels[0], labels[-1]) == ("Ankle boot", "T - shirt / top")


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
    assert plot_timeline([], "Nothing").axes[0].patches[:] == []
