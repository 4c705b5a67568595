"""What only the notebooks use: answers to exercises, pictures, and Flower's own processes.

The folder lies beside the notebooks, which run in theirs, so that it needs no installation.
"""

from course import checks
from course.contest import Contest
from course.deployment import Deployment
from course.draw import WatchedGrid, draw
from course.plots import (
    CENTRAL,
    FEDERATED,
    NEUTRAL,
    TEN_COLOURS,
    WAITING,
    Span,
    plot_metrics,
    plot_partitions,
    plot_timeline,
)
from course.processes import FlowerHome
from course.setup import set_up_notebook, show, write_small_copy
from course.virtual import VirtualGrid

__all__ = [
    "CENTRAL",
    "FEDERATED",
    "NEUTRAL",
    "TEN_COLOURS",
    "WAITING",
    "Contest",
    "Deployment",
    "FlowerHome",
    "Span",
    "VirtualGrid",
    "WatchedGrid",
    "checks",
    "draw",
    "plot_metrics",
    "plot_partitions",
    "plot_timeline",
    "set_up_notebook",
    "show",
    "write_small_copy",
]
