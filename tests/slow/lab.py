"""JupyterLab as ``make lab`` starts it, and a notebook in it, driven as a learner does."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from playwright.sync_api import Browser, Locator, Page, expect

import refresh

REPOSITORY = refresh.HERE.parent
START_S, CELL_S = 120, 300
RED = ":is([data-mime-type$='vnd.jupyter.stderr'], [data-mime-type$='vnd.jupyter.error'])"


@contextmanager
def serve(scratch: Path, mark: str) -> Iterator[str]:
    """Start the server on a copy of the course, yield its address, and stop it.

    Args:
        scratch: An empty folder, for the copy and for all that Jupyter keeps.
        mark: The token, and what ``refresh.left_running`` finds processes by.
    """
    for part in ("notebooks", "_static", "fedlib"):
        ignored = shutil.ignore_patterns("outputs", ".*", "__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / part, scratch / "copy" / part, ignore=ignored)
    own = {f"JUPYTER_{kind}_DIR": str(scratch / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(scratch / "ipython"), refresh.MARK: mark}
    settings = scratch / "CONFIG" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8"
    )
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^\t\$\(BIN\)/jupyter lab (.*)$", makefile, re.M)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={mark}", *arguments.split()]
    environment = refresh.environment(scratch) | own
    with (scratch / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=scratch / "copy", env=environment, stdout=log, stderr=log
        )
    try:
        yield _address(server, scratch)
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()


def _address(server: subprocess.Popen[bytes], scratch: Path) -> str:
    """Wait for the file in which a server says where it listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        for file in (scratch / "RUNTIME").glob("jpserver-*.json"):
            with suppress(json.JSONDecodeError):  # being written
                return str(json.loads(file.read_text(encoding="utf-8"))["url"])
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{(scratch / 'log').read_text('utf-8')}")


class Lab:
    """One notebook, open in JupyterLab: cell n of the file is cell n on the page."""

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        self.source: NotebookNode = nbformat.read(refresh.HERE / f"{name}.ipynb", as_version=4)
        self.panel = page.locator(".jp-NotebookPanel")

    def number(self, tag: str) -> int:
        """Return the number of the cell with a tag."""
        tags = [cell.metadata.get("tags", ()) for cell in self.source.cells]
        return next(n for n, has in enumerate(tags) if tag in has)

    def find(self, text: str) -> int:
        """Return the number of the first code cell that has this text."""
        cells = enumerate(self.source.cells)
        return next(n for n, c in cells if c.cell_type == "code" and text in c.source)

    def cell(self, number: int) -> Locator:
        """Return a cell on the page."""
        return self.panel.locator(f'.jp-Cell[data-windowed-list-index="{number}"]')

    def menu(self, *labels: str) -> None:
        """Choose from the menu bar, such as "Kernel", "Restart Kernel…"."""
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(labels[0], exact=True).click()
        for label in labels[1:]:
            self.page.locator(".lm-Menu-itemLabel").get_by_text(label, exact=True).click()

    def run_on(self, number: int) -> None:
        """Press Shift+Enter in the current cell, and wait until it is done.

        Raises:
            AssertionError: The cell is not the current one, raised, wrote in red, or took too long.
        """
        expect(self.cell(number), f"cell {number}").to_have_class(re.compile("jp-mod-active"))
        prompt = "".join(self.cell(number).locator(".jp-InputPrompt").all_text_contents())
        before = "".join(re.findall(r"\d", prompt))
        self.page.keyboard.press("Shift+Enter")
        self.wait_for(number, rf"(?!{before}\])\d+")

    def wait_for(self, number: int, count: str) -> None:
        """Wait until a code cell has such an execution count, and no cell a red box.

        A folded cell shows no count: it is done when the next one is.
        """
        cell = self.source.cells[number]
        folded = cell.metadata.get("jupyter", {}).get("source_hidden")
        if cell.cell_type == "code" and not folded:
            prompt, done = self.cell(number).locator(".jp-InputPrompt"), rf"^\[{count}\]:$"
            expect(prompt, cell.source).to_have_text(re.compile(done), timeout=1000 * CELL_S)
        red = self.panel.locator(RED)
        assert not red.count(), f"cell {number}:\n{red.first.text_content()}"

    def output(self, number: int) -> Locator:
        """Return what a cell printed or drew."""
        return self.cell(number).locator(".jp-OutputArea-output")

    def fill(self, number: int, text: str) -> None:
        """Replace a cell's text, as by pasting."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)


@contextmanager
def opened(browser: Browser, server: str, mark: str, name: str) -> Iterator[Lab]:
    """Open a notebook."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(30_000)
    lab, place = Lab(page, name), f"lab/tree/notebooks/{name}.ipynb?reset&token={mark}"
    try:
        page.goto(server + place, timeout=1000 * START_S)
        last = lab.cell(len(lab.source.cells) - 1)
        last.wait_for(state="attached", timeout=1000 * START_S)
        yield lab
    finally:
        page.close()
