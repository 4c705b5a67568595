"""Every notebook runs with its exercises solved; as committed, it runs under nbmake."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import refresh

from test_notebooks import NOTEBOOKS, read, tagged, texts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_with_every_exercise_solved_it_runs_and_leaves_no_process(
    path: Path, tmp_path: Path
) -> None:
    notebook = read(path)
    refresh.solve(notebook)
    mark = uuid.uuid4().hex
    refresh.execute(notebook, refresh.environment(tmp_path) | {"NOTEBOOK_UNDER_TEST": mark})
    for check in tagged(notebook, "check").values():
        assert "".join(texts(check)).startswith("✅")
    assert left_over(mark) == []


def left_over(mark: str) -> list[str]:
    """The processes that a notebook started and that still run, found by what they inherit."""
    _, alive = psutil.wait_procs(list(marked(mark)), timeout=10)
    return [" ".join(process.cmdline()) for process in alive]


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            inherited = process.environ().get("NOTEBOOK_UNDER_TEST") == mark
        except psutil.Error:
            continue
        if inherited and process.pid != os.getpid():
            yield process
