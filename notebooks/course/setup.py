"""What a notebook needs: a quiet engine, one style for figures, pictures with words, small data.

Nothing here computes anything. The apps do not import it.
"""

import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fedlib.console import StdoutHandler, tidy_flower_log
from fedlib.plots import STYLE
from fedlib.prepare import FASHION_MNIST, find_source

BACKEND: Any = {
    "client_resources": {"num_cpus": 1, "max_restarts": -1},
    "init_args": {"logging_level": "ERROR", "log_to_driver": False},
}
"""``backend_config`` for ``run_simulation``: one core a client process, which Ray brings back if
it dies (Flower hands the options to ``ray.remote``), and no chatter from Ray (to ``ray.init``)."""
MARGIN = 0.1
"""Inches of paper around a figure: on a dark page, it ends where the picture does."""


def set_up_notebook() -> None:
    """Prepare the kernel: the course's plotting style, and an engine that says what matters.

    Flower's notes (how many actors, what is deprecated) are left out. Its errors, a client's
    traceback for one, are shown in full, as ordinary output: its own log goes to standard
    error, which notebooks draw as a red box. Calling it twice does no harm.
    """
    import flwr.app  # noqa: F401  (makes its logger, which is then changed)

    plt.style.use(STYLE)
    # Read when Ray is imported: no tip about a future version, no page about a dead worker.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died")
    flower = logging.getLogger("flwr")
    flower.handlers = [StdoutHandler(logging.ERROR)]
    flower.handlers[0].addFilter(_ClientErrors())
    flower.propagate = False
    tidy_flower_log()


class _ClientErrors(logging.Filter):
    """Leaves, of what a simulation logs for a client's error, the client's own traceback.

    Of a process that died there is none: one line in place of Ray's and Flower's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last, self._when = "", 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"\x1b\[\d+m", "", record.getMessage())
        _, found, traceback = text.partition("ray::ClientAppActor.run()")
        if found:
            own = traceback.partition("\n\nThe above exception")[0].splitlines()[1:]
            text = "\n".join(["A client raised:", *(x for x in own if x.strip(" ^~"))])
        elif text.startswith("The actor") or "ray.exceptions.Actor" in text:
            text = "A client process died; the message that it had is lost."
        record.msg, record.args = text, ()
        if text.startswith("An exception was raised when processing a message"):
            return False
        again = text == self._last and record.created - self._when < 1  # logged twice each
        self._last, self._when = text, record.created
        return not again


def show(figure: Figure, alt: str) -> None:
    """Display a figure once, as a picture with a text alternative, and close it.

    Args:
        figure: What was drawn.
        alt: What the picture shows, for those who do not see it: one or two sentences.
    """
    from IPython.display import display

    width, height = figure.get_size_inches()
    frame = Bbox.from_extents(-MARGIN, -MARGIN, width + MARGIN, height + MARGIN)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, bbox_inches=frame)
    plt.close(figure)
    display(  # type: ignore[no-untyped-call]
        {"image/png": buffer.getvalue(), "text/plain": alt},
        metadata={"image/png": {"alt": alt, "width": round(80 * frame.width)}},
        raw=True,
    )


def write_small_copy(folder: Path, num_train: int, num_test: int) -> None:
    """Write the first images of Fashion-MNIST as a data set of their own, for quick runs.

    Args:
        folder: Where the two parquet files shall lie; it is made if need be.
        num_train: How many images to train on.
        num_test: How many to test on.
    """
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    for split, size in (("train", num_train), ("test", num_test)):
        rows = datasets.load_dataset(find_source(FASHION_MNIST).path, split=f"{split}[:{size}]")
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
