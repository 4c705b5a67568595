"""What a learner does in JupyterLab works, and looks as it should.

The pictures are kept in ``artefacts/jupyterlab``, for a look at them.
"""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import refresh

from browser import launch
from test_notebook_runs import solve

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from lab import Lab


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with launch() as started:
        yield started


@pytest.fixture(scope="module")
def address(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's; when it has ended, nothing that it started runs on."""
    from lab import serve

    mark = uuid.uuid4().hex
    with serve(tmp_path_factory.mktemp("lab"), mark) as where:
        yield where
    assert refresh.left_running(mark) == []


def test_the_first_notebook_runs_from_top_to_bottom(browser: "Browser", address: str) -> None:
    from lab import opened

    with opened(browser, address, "00-start-here") as lab:
        step_through(lab)
        lab.look_at(
            {
                "top": 0,
                "garments": lab.find("ax.imshow"),
                "log": lab.find("run_simulation(\n"),
                "metrics": lab.find("plot_metrics(results)"),
                "timeline": lab.find("plot_timeline(bars"),
                "map": lab.find("BUILT_IN"),
                "courses": lab.find("BUILT_IN") + 1,
            }
        )


def test_the_second_runs_its_slider_moves_and_an_exercise_is_solved(
    browser: "Browser", address: str
) -> None:
    from lab import opened

    with opened(browser, address, "01-fifty-data-sets") as lab:
        step_through(lab)
        move_the_slider(lab)
        solve_an_exercise(lab)
        restart_and_run_all(lab)
        lab.look_at(
            {
                "top": 0,
                "bars": lab.find("plot_partitions(partitioner"),
                "garments": lab.find("favourite ="),
                "slider": lab.find("widgets.interact("),
                "exercise": lab.number("exercise-1"),
                "heat-maps": lab.find("From islands to copies"),
                "curves": lab.find("Sizes draw together"),
            }
        )


def step_through(lab: "Lab") -> None:
    """Shift+Enter from the first cell to the last, without the saved outputs."""
    lab.menu("Edit", "Clear Outputs of All Cells")
    lab.page.keyboard.press("Escape")
    for number in range(len(lab.source.cells)):
        lab.run_on(number)


def move_the_slider(lab: "Lab") -> None:
    """By keyboard: one step to the right draws another picture."""
    cell = lab.cell(lab.find("widgets.interact("))
    before = cell.locator("img").get_attribute("src")
    cell.get_by_role("slider").press("ArrowRight")
    cell.locator(f'img:not([src="{before}"])').wait_for()
    assert cell.locator("img").count() == 1
    assert "0.178" in cell.text_content()


def solve_an_exercise(lab: "Lab") -> None:
    """Paste the solution over the stub and run it, then its check."""
    exercise, check = lab.number("exercise-1"), lab.number("check-1")
    assert "⏳" in lab.cell(check).text_content()
    solved = lab.source.copy()
    solve(solved)
    lab.fill(exercise, solved.cells[exercise].source)
    lab.run_on(exercise)
    lab.run_on(check)
    assert "✅" in lab.cell(check).locator(".jp-OutputArea-output").text_content()


def restart_and_run_all(lab: "Lab") -> None:
    """From the menu: cells count from 1 again, and the exercise is still solved."""
    lab.menu("Kernel", "Restart Kernel and Run All Cells…")
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    code = [n for n, cell in enumerate(lab.source.cells) if cell.cell_type == "code"]
    for count, number in enumerate(code, start=1):
        lab.wait_for(number, str(count))
    check = lab.cell(lab.number("check-1")).locator(".jp-OutputArea-output")
    assert "✅" in check.text_content()
