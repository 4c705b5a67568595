"""Build the course as a static site, from the committed outputs: ``build.py [FOLDER]``.

The site goes to FOLDER/html; without a folder, to .book/html, as ``make book`` does. A copy of the
pages is staged in FOLDER/source: the Markdown files, the notebooks, the modules and the pictures.
Sphinx makes the site of it, and takes a warning, such as a link to no file, for an error. Nothing
is executed and nothing is fetched.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

BOOK = Path(__file__).resolve().parent
REPOSITORY = BOOK.parent.parent

STAGED = (
    *("*.md", "*.yaml", "*.txt", "LICENSE", ".github/workflows/*", "_static/*", "docs/*.md"),
    *("docs/*.py", "_static/diagrams/*.svg", "_static/labs/*.json"),
    *("fedlib/*.md", "fedlib/fedlib/**/*.py", "fedlib/fedlib/**/*.md"),
    *("notebooks/*.md", "notebooks/*.ipynb", "notebooks/course/**/*.py", "tools/*.py"),
)
"""Pages, and all that they may link to: a module becomes a page, other files can be downloaded."""
MODULE_LIST = """
```{toctree}
:hidden:
:glob:

fedlib/*
fedlib/*/*
```
"""
CHAPTER = re.compile(
    r"^\| (\d\d) \| \[(.+?)\]\((\S+)\.ipynb\) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE
)
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


def stage(source: Path) -> None:
    """Copy what the site is made of, and add what only the site has."""
    for file in (f for pattern in STAGED for f in REPOSITORY.glob(pattern) if f.is_file()):
        to = source / file.relative_to(REPOSITORY)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb":
            nbformat.write(site_notebook(file), to)
        else:
            shutil.copyfile(file, to)
    with (source / "fedlib" / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(MODULE_LIST)
    chapters = CHAPTER.findall((REPOSITORY / "README.md").read_text("utf-8"))
    cards = "\n".join(CARD.format(*chapter) for chapter in chapters)
    index = (BOOK / "index.md").read_text("utf-8").replace("CARDS", cards)
    (source / "index.md").write_text(index, "utf-8")


def site_notebook(file: Path) -> nbformat.NotebookNode:
    """Return a notebook without its cell for Colab, its pictures with the words they have."""
    notebook = nbformat.read(file, as_version=4)
    notebook.cells = [c for c in notebook.cells if "colab" not in c.metadata.get("tags", ())]
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())  # show() keeps the words with the picture
        pictures = [output.get("metadata", {}).get("image/png", {}) for output in outputs]
        if words := next((picture["alt"] for picture in pictures if "alt" in picture), None):
            cell.metadata["mystnb"] = {"image": {"alt": words}}
    return notebook


def build(output: Path) -> Path:
    """Build into ``output / "html"``, which is returned, with whatever was there before gone.

    Raises:
        subprocess.CalledProcessError: Sphinx found something wrong, and printed it.
    """
    shutil.rmtree(output, ignore_errors=True)
    source, html = output / "source", output / "html"
    stage(source)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto"]
    folders = ["-c", str(BOOK), "-d", str(output / "doctrees"), str(source), str(html)]
    subprocess.run([*command, *folders], check=True)
    for template in (html / "_static").glob("*webpack-macros.html"):
        template.unlink()  # the theme's own, no pages
    return html


def main() -> int:
    """Build the book, and say where it is."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / ".book"
    try:
        print(f"The book: {build(output) / 'index.html'}")
    except subprocess.CalledProcessError:
        print("The book: Sphinx's warnings, above, are errors; mend the pages that they name")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
