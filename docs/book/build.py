"""Build the course as a static site in .book/html, from the committed outputs: make book.

A copy of the pages is staged in .book/source: the Markdown files, the notebooks, fedlib's modules,
and whatever these link to. Nothing is executed and nothing is fetched.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat

BOOK = Path(__file__).resolve().parent
REPOSITORY = BOOK.parent.parent

DOCUMENTS = ("*.md", "notebooks/*.md", "notebooks/*.ipynb", "fedlib/*.md", "fedlib/fedlib/*/*.md")
MODULES = "fedlib/fedlib/*.py"
# A link or picture whose target is a path, up to the fragment.
LINK = re.compile(r"(?<=\]\()[^)#\s:]+")
CHAPTER = re.compile(
    r"^\| (\d\d) \| \[(.+?)\]\((\S+)\) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE
)

MODULE_LIST = """
```{toctree}
:hidden:
:glob:

fedlib/*
fedlib/*/*
```
"""
CARD = """
:::{{grid-item-card}} {0} · {1}
:link: {2}
:link-type: doc

**By hand:** {3}.

**At the end:** {4}.

```{{card-footer}}
{5} of computing
```
:::
"""


class Stage:
    """The folder from which Sphinx builds: the site's pages, their links as the site needs them."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder = repository, folder

    def fill(self) -> None:
        for file in self.repository.glob(MODULES):
            self.add(file, ".source")
        for file in (f for pattern in DOCUMENTS for f in self.repository.glob(pattern)):
            to = self.add(file)
            if file.suffix == ".ipynb":
                nbformat.write(self.notebook(file), to)
            else:
                to.write_text(self.with_site_links(file.read_text("utf-8"), file.parent), "utf-8")
        with (self.folder / "fedlib" / "README.md").open("a", encoding="utf-8") as readme:
            readme.write(MODULE_LIST)
        index = (BOOK / "index.md").read_text("utf-8")
        index = index.replace("CARDS", cards((self.repository / "README.md").read_text("utf-8")))
        index = self.with_site_links(index, self.repository)
        (self.folder / "index.md").write_text(index, "utf-8")

    def add(self, file: Path, suffix: str = "") -> Path:
        to = self.folder / f"{file.relative_to(self.repository)}{suffix}"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
        return to

    def notebook(self, file: Path) -> nbformat.NotebookNode:
        notebook = nbformat.read(file, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "colab" not in tags(cell)]
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.with_site_links(cell.source, file.parent)
            elif alt := alternative_text(cell):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
        return notebook

    def with_site_links(self, text: str, folder: Path) -> str:
        return LINK.sub(lambda match: self.site_path(match[0], folder), text)

    def site_path(self, target: str, folder: Path) -> str:
        """What a link's target is called in the site; a source file is added on the way."""
        found = (folder / unquote(target)).resolve()
        if not found.is_relative_to(self.repository):
            return target
        if found.is_dir() and (found / "README.md").is_file():
            return f"{target.rstrip('/')}/README.md"
        if not found.is_file() or found.suffix in (".md", ".ipynb"):
            return target
        suffix = "" if found.suffix in (".png", ".svg") else ".source"
        self.add(found, suffix)
        return target + suffix


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def alternative_text(cell: nbformat.NotebookNode) -> str:
    """The alternative text of a cell's picture, which Jupyter keeps with the output."""
    pictures = [output.get("metadata", {}).get("image/png", {}) for output in cell.outputs]
    return next((picture["alt"] for picture in pictures if "alt" in picture), "")


def cards(readme: str) -> str:
    """A card for each chapter, from the table in the README."""
    return "\n".join(
        CARD.format(number, title, path.removesuffix(".ipynb"), *rest)
        for number, title, path, *rest in CHAPTER.findall(readme)
    )


def render(source: Path, html: Path) -> None:
    """Run Sphinx; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto"]
    subprocess.run(
        [*command, "-c", str(BOOK), "-d", str(html.parent / "doctrees"), str(source), str(html)],
        check=True,
    )
    for template in (html / "_static").glob("*webpack-macros.html"):
        template.unlink()  # the theme's own, no pages


class Page(HTMLParser):
    """What a page asks for: where its links lead, what it loads, and the ids that it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        if "id" in given:
            self.ids.add(given["id"])
        self.targets += [given[name] for name in ("href", "src") if name in given]
        self.loads += [given[name] for name in ("src", "poster", "data") if name in given]
        self.loads += css_loads(given.get("style", ""))
        if tag == "link":
            self.loads += [given["href"]] if "href" in given else []

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.loads += css_loads(data)


def css_loads(css: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import(?=\s*["']))\s*["']?([^"')\s]+)""", css)


def is_elsewhere(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme not in ("", "data")


def problems(html: Path) -> list[str]:
    """Each link within the site that leads nowhere, and whatever another host would be asked for.

    Ordinary links to other sites are neither followed nor counted.
    """
    html = html.resolve()
    pages = {page: Page(page.read_text("utf-8")) for page in sorted(html.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(html)
        found += [
            f"{name}: leads nowhere: {t}" for t in page.targets if not leads(t, path, html, pages)
        ]
        found += [f"{name}: from another host: {a}" for a in page.loads if is_elsewhere(a)]
    for sheet in html.rglob("*.css"):
        loads = [a for a in css_loads(sheet.read_text("utf-8")) if is_elsewhere(a)]
        found += [f"{sheet.relative_to(html)}: from another host: {a}" for a in loads]
    return found


def leads(target: str, path: Path, html: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link on the page at `path` leads to a file, and to a place that the file has.

    Other sites are taken at their word.
    """
    if urlsplit(target).scheme or target.startswith("//"):
        return True
    address, fragment = (unquote(part) for part in urldefrag(target))
    file = (path.parent / address.partition("?")[0]).resolve() if address else path
    if not file.is_file() or not file.is_relative_to(html):
        return False
    return not fragment or file not in pages or fragment in pages[file].ids


def build(repository: Path, output: Path) -> Path:
    """Build into `output` / html, which is returned, with whatever was there before gone."""
    shutil.rmtree(output, ignore_errors=True)
    Stage(repository, output / "source").fill()
    render(output / "source", output / "html")
    return output / "html"


def main() -> int:
    try:
        html = build(REPOSITORY, REPOSITORY / ".book")
    except subprocess.CalledProcessError:
        print("The book: Sphinx's warnings, above, are errors; mend the pages that they name")
        return 1
    found = problems(html)
    print("\n".join(found) or f"The book: {html / 'index.html'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
