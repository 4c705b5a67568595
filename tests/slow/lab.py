"""JupyterLab as ``make lab`` starts it, and a notebook in it, driven as a learner does.

Its settings are those of a new installation, but for the question whether to fetch news.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
import refresh
from nbformat import NotebookNode
from playwright.sync_api import Browser, Error, Locator, Page, expect

REPOSITORY = Path(refresh.__file__).parent.parent
ARTEFACTS = REPOSITORY / "artefacts" / "jupyterlab"
WIDTHS = (1280, 900)
THEMES = ("JupyterLab Dark", "JupyterLab Light")  # the default last: it stays for the next page
START_S, CELL_S, REDRAW_S = 120, 300, 60
RED = ":is([data-mime-type$='vnd.jupyter.stderr'], [data-mime-type$='vnd.jupyter.error'])"
MISFITS = """
    notebook => [...notebook.querySelectorAll("img")].flatMap(image => {
        const frame = image.closest(".jp-OutputArea-output, .jp-MarkdownOutput").clientWidth;
        const shape = image.naturalWidth / image.naturalHeight;
        const what = image.alt || "picture of cell " +
            image.closest(".jp-Cell").dataset.windowedListIndex;
        if (!image.naturalWidth) return [what + ": not found"];
        if (image.clientWidth > frame) return [what + ": cut off at the right"];
        if (Math.abs(image.clientWidth / image.clientHeight / shape - 1) > 0.05)
            return [what + ": out of shape"];
        return [];
    })
"""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Where it listens.
        token: What it asks a browser for.
        folder: Its copy of the course.
    """

    url: str
    token: str
    folder: Path


@contextmanager
def serve(scratch: Path, mark: str) -> Iterator[Server]:
    """Start the server on a copy of the course, and stop it.

    Args:
        scratch: An empty folder, for the copy and for all that Jupyter keeps.
        mark: By which ``refresh.left_running`` finds what the server and its kernels started.
    """
    folder = scratch / "course"
    for part in ("notebooks", "_static", "fedlib"):
        ignored = shutil.ignore_patterns("outputs", ".*", "__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
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
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={mark}"]
    with (scratch / "server.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [*command, *arguments.split()],
            cwd=folder,
            env=refresh.environment(scratch) | own,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Server(_url(server, scratch), mark, folder)
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()


def _url(server: subprocess.Popen[bytes], scratch: Path) -> str:
    """Wait for the file in which a server says where it listens."""
    for _ in range(10 * START_S):
        for file in (scratch / "RUNTIME").glob("jpserver-*.json"):
            with suppress(json.JSONDecodeError):  # being written
                return str(json.loads(file.read_text(encoding="utf-8"))["url"])
        if server.poll() is not None:
            break
        time.sleep(0.1)
    log = (scratch / "server.log").read_text(encoding="utf-8")
    raise AssertionError(f"JupyterLab did not start:\n{log}")


class Lab:
    """One notebook, open in JupyterLab.

    Attributes:
        page: The browser's page.
        source: What was opened: cell n of the file is cell n on the page.
    """

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.name = path.stem[:2]
        self.source: NotebookNode = nbformat.read(path, as_version=4)
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
            item = self.page.locator(".lm-Menu-itemLabel").get_by_text(label, exact=True)
            item.click()

    def run_on(self, number: int) -> None:
        """Press Shift+Enter in the current cell, and wait until it is done.

        Raises:
            AssertionError: The cell is not the current one, raised, wrote in red, or took too long.
        """
        expect(self.cell(number), self.where(number)).to_have_class(re.compile("jp-mod-active"))
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
            prompt = self.cell(number).locator(".jp-InputPrompt")
            done = re.compile(rf"^\[{count}\]:$")
            expect(prompt, self.where(number)).to_have_text(done, timeout=1000 * CELL_S)
        red = self.panel.locator(f".jp-Cell:has({RED})")
        if red.count():
            failed = int(red.first.get_attribute("data-windowed-list-index") or 0)
            what = red.first.locator(RED).first.text_content()
            raise AssertionError(f"{self.where(failed)}\n{what}")

    def output(self, number: int) -> str:
        """Return what a cell printed."""
        return self.cell(number).locator(".jp-OutputArea-output").text_content() or ""

    def pictures(self, number: int) -> list[str]:
        """Return the pictures that a cell shows, as data."""
        images = self.cell(number).locator("img")
        return [str(source) for source in images.evaluate_all("all => all.map(i => i.src)")]

    def wait_for_other(self, pictures: list[str], number: int) -> None:
        """Wait until a cell shows as many pictures, but other ones."""
        for _ in range(10 * REDRAW_S):
            now = self.pictures(number)
            if len(now) == len(pictures) and now != pictures:
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{self.where(number)}: still the same picture after {REDRAW_S} s")

    def where(self, number: int) -> str:
        """Return what a message calls a cell."""
        return f"{self.name}, cell {number}: {self.source.cells[number].source.splitlines()[0]}"

    def fill(self, number: int, text: str) -> None:
        """Replace a cell's text, as by pasting."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)

    def look_at(self, places: dict[str, int]) -> None:
        """Keep a picture of each place in both themes and widths; no figure may be cut off.

        Args:
            places: What to call it, and the number of the cell that is scrolled to the top.
        """
        for theme in THEMES:
            self.menu("Settings", "Theme", theme)
            self.page.locator(f'body[data-jp-theme-name="{theme}"]').wait_for(state="attached")
            for width in WIDTHS:
                self.page.set_viewport_size({"width": width, "height": 800})
                for place, number in places.items():
                    self.scroll_to(number)
                    shade = theme.split()[1].lower()
                    self.keep(f"{self.name}-{place}-{width}-{shade}")
                misfits = self.panel.evaluate(MISFITS)
                assert not misfits, f"{self.name}, {width} pixels wide: {misfits}"
                outer = self.panel.locator(".jp-WindowedPanel-outer")
                wide = outer.evaluate("e => e.scrollWidth > e.clientWidth + 1")
                assert not wide, f"{self.name}, {width} pixels wide: the page scrolls sideways"

    def scroll_to(self, number: int) -> None:
        """Bring a cell to the top: again when it has moved, as what is drawn takes its height."""
        cell, before = self.cell(number), None
        while before != (now := cell.bounding_box()):
            before = now
            cell.evaluate("cell => cell.scrollIntoView()")
            self.page.wait_for_timeout(50)

    def keep(self, name: str) -> None:
        """Save what the page shows under ``artefacts/``."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png")


@contextmanager
def opened(browser: Browser, server: Server, name: str) -> Iterator[Lab]:
    """Open a notebook; if the block fails, keep a picture of it."""
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 800})
    page.set_default_timeout(30_000)
    lab = Lab(page, server.folder / "notebooks" / f"{name}.ipynb")
    try:
        page.goto(
            f"{server.url}lab/tree/notebooks/{name}.ipynb?reset&token={server.token}",
            timeout=1000 * START_S,
        )
        last = lab.cell(len(lab.source.cells) - 1)
        last.wait_for(state="attached", timeout=1000 * START_S)
        yield lab
    except (AssertionError, Error):
        lab.keep(f"{lab.name}-failed")
        raise
    finally:
        page.close()
