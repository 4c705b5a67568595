"""Every notebook runs with its exercises solved, and an engine in it says what matters.

00 and 01 are not here: test_jupyterlab.py steps through them, and solves them, in a browser.

Cells tagged ``engine`` start Flower's processes, or look at what came of it, and no exercise needs
them: nbmake runs them, and once is enough.
"""

import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
from nbformat import NotebookNode

import refresh
from test_notebooks import NOTEBOOKS, read, solution_code, tagged, texts


@pytest.mark.parametrize("path", NOTEBOOKS[2:], ids=lambda path: path.stem)
def test_with_every_exercise_solved_it_runs_and_leaves_no_process(
    path: Path, tmp_path: Path
) -> None:
    notebook, mark = read(path), uuid.uuid4().hex
    solve(notebook)
    notebook.cells = [
        cell for cell in notebook.cells if "engine" not in cell.metadata.get("tags", ())
    ]
    refresh.execute(notebook, refresh.environment(tmp_path) | {refresh.MARK: mark})
    for check in tagged(notebook, "check").values():
        assert "".join(texts(check)).startswith("✅")
    assert refresh.left_running(mark) == []


def solve(notebook: NotebookNode) -> None:
    """Put the folded solutions into the stubs."""
    solutions = tagged(notebook, "solution")
    for number, stub in tagged(notebook, "exercise").items():
        stub.source = solution_code(solutions[number]).rstrip()


SIMULATION = """
    from course import set_up_notebook

    set_up_notebook()
    import os, time
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from fedlib import simulate

    client, server = ClientApp(), ServerApp()

    @client.train()
    def fail(message, context):
        if context.node_config["partition-id"] == 0:
            raise ValueError("two\\nlines")
        os._exit(1)

    @server.main()
    def main(grid, context):
        while len(nodes := list(grid.get_node_ids())) < 2:
            time.sleep(0.1)
        messages = [Message(RecordDict(), dst_node_id=n, message_type="train") for n in nodes]
        print("errors:", sum(r.has_error() for r in grid.send_and_receive(messages, timeout=60)))

    simulate(server, client, 2)
"""


def test_a_simulation_says_what_a_learners_client_raised_or_that_it_died_and_nothing_else() -> None:
    code, env = textwrap.dedent(SIMULATION), os.environ | {"PYTHONPATH": str(NOTEBOOKS[0].parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line[:2] != "  "]
    expected = ["A client raised:", "ValueError: two", "lines", "errors: 2"]
    assert sorted(lines) == sorted(
        [*expected, "A client process died; the message that it had is lost."]
    )
