"""What a notebook needs: an engine that says what matters, pictures with words, fair verdicts."""

import io
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output
from matplotlib.figure import Figure

from fedlib import BACKEND, set_up_notebook, show
from fedlib.verdict import check, expect

SIMULATION = """
    from flwr.app import RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation
    from fedlib import BACKEND, Federation, make_client_app, set_up_notebook

    set_up_notebook()
    set_up_notebook()
    client, server = make_client_app(), ServerApp()

    @client.query("fail")
    def fail(message, context):
        raise ValueError("two\\nlines")

    @server.main()
    def main(grid, context):
        federation = Federation(grid)
        nodes = federation.roll_call(60, wait_for_all=True)
        stage = federation.ask("query.fail", nodes[:1], RecordDict(), 30, lambda *_: None)
        print("problem:", stage.problems[0].partition(": ")[2])

    for _ in range(2):
        run_simulation(server, client, num_supernodes=2, backend_config=BACKEND)
"""


def test_a_simulation_says_a_clients_error_in_full_and_nothing_else() -> None:
    code = textwrap.dedent(SIMULATION)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines.count("A client raised:") == 2  # one for each simulation
    assert lines.count("ValueError: two") == 2
    assert lines.count("problem: ValueError: two lines") == 2
    known = ("A client raised:", "  ", "ValueError: two", "lines", "problem: ")
    assert [line for line in lines if not line.startswith(known)] == []


@pytest.fixture
def flower() -> Iterator[logging.Logger]:
    """Flower's logger, set up as in a notebook and put back afterwards."""
    logger = logging.getLogger("flwr")
    before = logger.handlers, logger.propagate
    set_up_notebook()
    yield logger
    logger.handlers, logger.propagate = before


def test_flowers_own_log_goes_to_standard_output(
    flower: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    flower.warning("deprecated")
    flower.error("node %d died", 7)
    captured = capsys.readouterr()
    assert captured.out == "node 7 died\n"
    assert captured.err == ""


def test_a_dead_client_process_is_one_line(
    flower: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    flower.error("An exception was raised when processing a message by RayBackend")
    flower.error("The actor died unexpectedly before finishing this task.")
    flower.error("Traceback ...\nray.exceptions.ActorDiedError: The actor died unexpectedly")
    died = "A client process died; the message that it had is lost.\n"
    assert capsys.readouterr().out == died


def test_a_dead_client_process_is_brought_back_on_a_core_of_its_own() -> None:
    assert BACKEND["client_resources"] == {"num_cpus": 1, "max_restarts": -1}


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


def test_a_figure_is_shown_once_with_its_words() -> None:
    figure, axes = plt.subplots(figsize=(5, 2))
    axes.plot([1, 2])
    output = shown(figure, "A line that rises.")
    assert output.data["image/png"].startswith(b"\x89PNG")
    assert output.data["text/plain"] == "A line that rises."
    assert output.metadata["image/png"] == {"alt": "A line that rises.", "width": 416}
    assert not plt.fignum_exists(figure.number)


def test_a_figure_has_a_margin_whatever_is_drawn_at_its_edge() -> None:
    figure = plt.figure(figsize=(2, 1), dpi=100, layout="none")
    figure.add_axes((0, 0, 1, 1)).imshow(np.zeros((1, 2)), aspect="auto")
    picture = plt.imread(io.BytesIO(shown(figure, "A dark field.").data["image/png"]))
    white = (picture == 1).all(axis=2)  # (height, width)
    assert white.shape == (120, 220)
    assert white[[0, -1]].all()
    assert white[:, [0, -1]].all()
    assert not white[12:-12, 12:-12].any()


@check
def half(answer: object) -> None:
    """Half of a number."""
    expect("of 8", answer(8), 4.0, "How many halves?")  # type: ignore[operator]


def test_a_verdict_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for answer, line in (
        (lambda x: x / 2, "✅ half: right."),
        (lambda x: x, "❌ half: of 8: expected 4, got 8, off by +4. How many halves?"),
        (lambda x: "4", "❌ half: of 8: expected numbers, got str. How many halves?"),
        (lambda x: x[0], "❌ half: it raised TypeError: 'int' object is not subscriptable"),
        (
            lambda x: None,
            "⏳ half: not yet. Fill in the cell above, run it, then run this one again.",
        ),
        (..., "⏳ half: not yet. Fill in the cell above, run it, then run this one again."),
    ):
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
        (1, {"w": 1}, "expected the keys ['w'], got int"),
        (np.ones((2, 1)), np.ones(2), "expected the shape (2,), got (2, 1)"),
        ([1, 2], [1, 2], ""),
        ([1, 3], [1, 2], "off by up to 1"),
        ("yes", "no", "expected 'no', got 'yes'"),
        ({1, 2}, {1}, "expected {1}, got {1, 2}"),
        (True, False, "expected False, got True"),
        (float("nan"), float("nan"), ""),
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
