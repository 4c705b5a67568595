"""What a learner does in JupyterLab works."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import pytest
from browser import launch
from test_notebook_runs import solve

import refresh
from test_notebooks import tagged

if TYPE_CHECKING:
    from lab import Lab

Opened = Callable[[str], AbstractContextManager["Lab"]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Opens a notebook; in the end, nothing that the server started runs on."""
    mark = uuid.uuid4().hex
    with launch() as browser:
        import lab  # needs playwright, without which launch() skips

        with lab.serve(tmp_path_factory.mktemp("lab"), mark) as server:
            yield partial(lab.opened, browser, server, mark)
    assert refresh.left_running(mark) == []


def test_the_first_notebook_runs_and_its_exercises_can_be_solved(opened: Opened) -> None:
    with opened("00-start-here") as lab:
        step_through(lab)
        solve_the_exercises(lab)


def test_in_the_second_the_slider_moves_and_solved_exercises_stay_solved(opened: Opened) -> None:
    with opened("01-fifty-data-sets") as lab:
        step_through(lab)
        move_the_slider(lab)
        solve_the_exercises(lab)
        restart_and_run_all(lab)


def step_through(lab: "Lab") -> None:
    """Shift+Enter from the first cell to the last, without the saved outputs."""
    lab.menu("Edit", "Clear Outputs of All Cells")
    for number in range(len(lab.source.cells)):
        lab.run_on(number)


def move_the_slider(lab: "Lab") -> None:
    """By keyboard: one step to the right draws another picture."""
    from playwright.sync_api import expect

    number = lab.find("widgets.interact(")
    picture = lab.output(number).locator("img")
    before = str(picture.get_attribute("src"))
    lab.cell(number).get_by_role("slider").press("ArrowRight")
    expect(picture).not_to_have_attribute("src", before, timeout=60_000)
    expect(lab.cell(number).locator(".widget-readout")).to_have_text("0.178")


def solve_the_exercises(lab: "Lab") -> None:
    """Paste each solution over its stub and run it, then its check."""
    solved = deepcopy(lab.source)
    solve(solved)
    for k in tagged(lab.source, "exercise"):
        exercise, check = lab.number(f"exercise-{k}"), lab.number(f"check-{k}")
        assert "⏳" in (lab.output(check).text_content() or "")
        lab.fill(exercise, solved.cells[exercise].source)
        for number in range(exercise, check + 1):
            lab.run_on(number)
        assert "✅" in (lab.output(check).text_content() or "")


def restart_and_run_all(lab: "Lab") -> None:
    """From the menu: cells count from 1 again, and the exercises are still solved."""
    lab.menu("Kernel", "Restart Kernel and Run All Cells…")
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    code = [n for n, cell in enumerate(lab.source.cells) if cell.cell_type == "code"]
    for count, number in enumerate(code, start=1):
        lab.wait_for(number, str(count))
    for k in tagged(lab.source, "check"):
        assert "✅" in (lab.output(lab.number(f"check-{k}")).text_content() or "")
