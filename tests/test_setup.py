"""What a notebook needs: an engine that says what matters, pictures with words, fair verdicts."""

import io
import logging
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from flwr.clientapp.client_app import ClientAppException
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output
from matplotlib.figure import Figure
from ray.exceptions import ActorDiedError, RayTaskError

from course import set_up_notebook, show
from course.verdict import check, expect

RAYS_TRACEBACK = """Traceback (most recent call last):
  File "cell", line 7, in raises
    raise ValueError("the disk is full")
ValueError: the disk is full

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "ray_actor.py", line 65, in run
    raise ClientAppException(str(ex)) from ex
ClientAppException: the disk is full"""


@pytest.fixture
def flower() -> Iterator[logging.Logger]:
    """Flower's logger, set up as in a notebook and put back afterwards."""
    logger = logging.getLogger("flwr")
    before = logger.handlers, logger.propagate
    set_up_notebook()
    set_up_notebook()  # the second time changes nothing
    yield logger
    logger.handlers, logger.propagate = before


def test_flowers_own_log_goes_to_standard_output(
    flower: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    flower.warning("deprecated")
    flower.error("node %d died", 7)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("node 7 died\n", "")


def worker(flower: logging.Logger, error: Exception) -> None:
    """Log an error as Flower's worker does (``vce_api.py``)."""
    flower.error(error)
    flower.error("Traceback (most recent call last): ...")


def test_a_clients_error_is_its_own_traceback_and_a_dead_process_one_line(
    flower: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an engine, test_notebook_runs.py sees the same."""
    raised = RayTaskError("run", RAYS_TRACEBACK, ClientAppException("the disk is full"), pid=1)
    worker(flower, raised.as_instanceof_cause())
    out = capsys.readouterr().out
    assert out.startswith('A client raised:\n  File "cell", line 7, in raises\n')
    assert out.endswith("ValueError: the disk is full\n")
    worker(flower, ActorDiedError())
    died = "A client process died; the message that it had is lost.\n"
    assert capsys.readouterr().out == died


def shown(figure: Figure, alt: str) -> RichOutput:
    """What ``show`` hands to the notebook."""
    InteractiveShell.instance()  # display() prints where there is no notebook
    try:
        with capture_output() as captured:
            show(figure, alt)
    finally:
        InteractiveShell.clear_instance()
    (output,) = captured.outputs
    return output


def test_a_figure_is_shown_once_with_its_words_and_a_margin() -> None:
    figure = plt.figure(figsize=(2, 1), dpi=100, layout="none")
    figure.add_axes((0, 0, 1, 1)).imshow(np.zeros((1, 2)), aspect="auto")
    output = shown(figure, "A dark field.")
    assert output.data["text/plain"] == "A dark field."
    assert output.metadata["image/png"] == {"alt": "A dark field.", "width": 176}
    assert not plt.fignum_exists(figure.number)
    white = (plt.imread(io.BytesIO(output.data["image/png"])) == 1).all(axis=2)  # (height, width)
    assert white.shape == (120, 220)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()
    assert not white[12:-12, 12:-12].any()


NOT_YET = "⏳ half: not yet. Fill in the cell above, run it, then run this one again."


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (lambda x: x / 2, "✅ half: right."),
        (lambda x: x, "❌ half: of 8: expected 4, got 8, off by +4. How many halves?"),
        (lambda x: x[0], "❌ half: it raised TypeError: 'int' object is not subscriptable"),
        (lambda x: None, NOT_YET),
        (..., NOT_YET),
    ],
)
def test_a_verdict_is_one_line(
    answer: object, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @check
    def half(answer: object) -> None:
        expect("of 8", answer(8), 4.0, "How many halves?")  # type: ignore[operator]

    if callable(answer):
        answer.__name__ = "half"
    half(answer)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("got", "wanted", "line"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, ""),
        ({"w": torch.tensor([1.0, 2.5])}, {"w": torch.tensor([1.0, 2.0])}, "off by up to 0.5"),
        ({"v": 1}, {"w": 1}, "expected the keys ['w'], got ['v']"),
        (np.ones((2, 1)), np.ones(2), "expected the shape (2,), got (2, 1)"),
        ("4", 4.0, "expected numbers, got str"),
        (float("nan"), 1.0, "expected 1, got nan"),
        (1.0 + 1e-9, 1.0, ""),
    ],
)
def test_a_verdict_compares_numbers_texts_tensors_and_mappings(
    got: object, wanted: object, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(lambda answer: expect("it", answer, wanted))(got)
    verdict = capsys.readouterr().out
    assert verdict.startswith("❌" if line else "✅")
    assert line in verdict
