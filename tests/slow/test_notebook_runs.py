"""Every notebook runs with its exercises solved; as committed, it runs under nbmake.

00 and 01 are not here: test_jupyterlab.py steps through them, and solves them, in a browser.

Cells tagged ``engine`` start Flower's processes, or look at what came of it, and no exercise needs
them: nbmake runs them, and once is enough.
"""

import re
import uuid
from pathlib import Path

import pytest
import refresh
from nbformat import NotebookNode

from test_notebooks import NOTEBOOKS, read, tagged, texts


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
        code = re.search(r"```python\n(.*?)```", solutions[number].source, re.DOTALL)
        assert code, f"solution {number} has no block of Python"
        stub.source = code[1].rstrip()
