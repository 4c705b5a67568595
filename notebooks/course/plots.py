"""Figures, in one style: drawn from ``results.json`` or from a partitioner, from nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

CENTRAL, FEDERATED, NEUTRAL = "#0072B2", "#D55E00", "#555555"
"""Blue, vermilion (Okabe & Ito, jfly.uni-koeln.de/color: told apart by everyone) and grey."""
TEN_COLOURS = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#BBBBBB"),
)
"""One for each class (Paul Tol, "Colour Schemes", SRON/EPS/TN/09-002: muted, and a grey)."""

KINDS = ((CENTRAL, ""), (FEDERATED, "//"), ("#009E73", ".."), ("#CC79A7", "xx"), ("#E69F00", "--"))
"""Colour (Okabe & Ito) and hatch of the kinds of work in a timeline, in order of appearance."""
WAITING = "waiting"

STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Span:
    """One bar of a timeline.

    Attributes:
        lane: Who: "server", "node 7". Lanes appear from top to bottom in the order given.
        start: When it began, in seconds.
        end: When it ended, in seconds.
        kind: What: "TRAIN", say; ``WAITING`` is drawn thin and grey.
    """

    lane: str
    start: float
    end: float
    kind: str


def plot_metrics(results: Mapping[str, Any]) -> Figure:
    """Draw accuracy, loss and learning rate over the rounds.

    Args:
        results: What results.json holds, with at least one round.

    Returns:
        Three panels; the bands are one standard deviation over the nodes that evaluated.
    """
    rounds = results["rounds"]
    with plt.rc_context(STYLE):
        figure, (accuracy, loss, rate) = plt.subplots(1, 3, figsize=(11, 3.4))
        _curves(accuracy, rounds, "accuracy", scale=100)
        _curves(loss, rounds, "loss", scale=1)
        accuracy.set(title=_accuracy_title(rounds), ylabel="accuracy (%)", ylim=(0, 100))
        loss.set(title="Loss", ylabel="cross-entropy (nats)")
        loss.set_ylim(bottom=0)
        accuracy.legend(loc="lower right")
        numbers = [r["server_round"] for r in rounds]
        rate.plot(numbers, [r["learning_rate"] for r in rounds], "s-", color=NEUTRAL, ms=4)
        schedule = results["config"]["learning-rate-schedule"]
        rate.set(title=f"Learning rate ({schedule})", ylabel="learning rate")
        rate.set_ylim(bottom=0)
        for axes in (accuracy, loss, rate):
            axes.set_xlabel("round")
            axes.xaxis.get_major_locator().set_params(integer=True)
        nodes = f"{results['num_partitions']} nodes"
        figure.suptitle(f"{Path(results['dataset']).name}, {nodes}", x=0.01, ha="left")
    return figure


def plot_partitions(partitioner: "Partitioner", title: str) -> Figure:
    """Draw how many examples of each class every partition holds.

    Args:
        partitioner: A partitioner of Flower Datasets, with its data set.
        title: What the picture shows.

    Source: ``flwr_datasets.visualization.plot_label_distributions``.
    """
    from flwr_datasets.visualization import plot_label_distributions  # two seconds

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes, _ = plot_label_distributions(
            partitioner=partitioner,
            label_name="label",
            cmap=ListedColormap(TEN_COLOURS),
            figsize=(11, 4),
        )
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set(title=title, xlabel="partition (one a node)", ylabel="training examples")
        axes.tick_params(axis="x", labelsize=7)
    drawn: Figure = figure
    return drawn


def plot_timeline(spans: Iterable[Span], title: str) -> Figure:
    """Draw who did what when: a lane each, a bar for each span.

    Args:
        spans: The bars, in the order in which their lanes and kinds shall appear.
        title: What the picture shows.
    """
    spans = list(spans)
    lanes = list(dict.fromkeys(span.lane for span in spans))
    looks = dict(zip(dict.fromkeys(s.kind for s in spans if s.kind != WAITING), KINDS))  # noqa: B905
    with plt.rc_context({**STYLE, "axes.grid.axis": "x", "hatch.linewidth": 0.6}):
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(lanes)))
        for span in spans:
            colour, hatch = looks.get(span.kind, ("#bbbbbb", ""))
            axes.barh(
                lanes.index(span.lane),
                max(span.end - span.start, 0.0),
                left=span.start,
                height=0.2 if span.kind == WAITING else 0.7,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                label=span.kind,
            )
        axes.set_yticks(range(len(lanes)), lanes, fontsize=8)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="seconds")
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curves(axes: Axes, rounds: list[dict[str, Any]], metric: str, scale: float) -> None:
    """Draw the central curve, and the federated one with a band, where there is a value."""
    central = _points(rounds, f"centralized_{metric}")
    federated = _points(rounds, f"federated_evaluate_{metric}")
    spread = dict(_points(rounds, f"federated_evaluate_{metric}_std"))
    if central:
        x, y = zip(*central, strict=True)
        axes.plot(x, [scale * v for v in y], "o-", color=CENTRAL, ms=4, label="central test set")
    if federated:
        x, y = zip(*federated, strict=True)
        low = [scale * (v - spread[n]) for n, v in federated]
        high = [scale * (v + spread[n]) for n, v in federated]
        label = "opted-in nodes, mean ± std"
        axes.fill_between(x, low, high, color=FEDERATED, alpha=0.18, linewidth=0)
        axes.plot(x, [scale * v for v in y], "^--", color=FEDERATED, ms=4, label=label)


def _points(rounds: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(r["server_round"], r[key]) for r in rounds if r[key] is not None]


def _accuracy_title(rounds: list[dict[str, Any]]) -> str:
    central = _points(rounds, "centralized_accuracy")
    return f"Accuracy: {100 * central[-1][1]:.1f} % at the end" if central else "Accuracy"
