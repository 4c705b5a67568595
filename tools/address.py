"""Write the course's address into every notebook and the README: ``make address REPOSITORY=…``.

It stands in ``colab.py``, once. That file is the cell that each notebook begins with, and the
badges lead to the same place. Without arguments the notebooks are brought in line with the file.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

TOOLS = Path(__file__).resolve().parent
CELL = TOOLS / "colab.py"
HERE = TOOLS.parent / "notebooks"
README = TOOLS.parent / "README.md"
TAG = "colab"
METADATA = {"tags": [TAG], "cellView": "form", "jupyter": {"source_hidden": True}}
"""Folded away: Colab shows the cell's title only, JupyterLab a button."""
ADDRESS = re.compile(r'^REPOSITORY = "(.*)"\nBRANCH = "(.*)"$', re.MULTILINE)
REPOSITORY = re.compile(r"https://github\.com/\w[\w-]*/(?!\.+$)[\w.-]+")
BRANCH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
NONE = "none"
BADGE = re.compile(r"\[!\[Open in Colab\]\(\S+\)\]\(\S+\)( · |\n\n)")
FLOWER_BADGE = re.compile(r"!\[Flower [^\]]*\]\(\.\./_static/badge\.svg\)( · )")
TITLE = re.compile(r"\A# .*\n(\n)")


def is_colab(cell: NotebookNode) -> bool:
    """Is this the cell that is for Colab only?"""
    return TAG in cell.metadata.get("tags", ())


def address() -> tuple[str, str]:
    """Return the repository's address ("" where none is set) and the branch."""
    found = ADDRESS.search(CELL.read_text(encoding="utf-8"))
    assert found, f"{CELL.name} has no lines REPOSITORY = … and BRANCH = …"
    return found[1], found[2]


def cell_source() -> str:
    """Return the text of the Colab cell."""
    return CELL.read_text(encoding="utf-8").rstrip("\n")


def with_address(cell: str, repository: str, branch: str) -> str:
    """Return the text of a Colab cell with another address in it."""
    return ADDRESS.sub(f'REPOSITORY = "{repository}"\nBRANCH = "{branch}"', cell)


def badge(name: str, static: str = "../_static") -> str:
    """Return the Markdown of a notebook's badge; nothing where no address is set."""
    repository, branch = address()
    path = repository.removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{path}/blob/{branch}/notebooks/{name}"
    return f"[![Open in Colab]({static}/colab.svg)]({target})" if repository else ""


def _after(place: re.Pattern[str], text: str, new: str, separator: str) -> str:
    """Remove an old badge from the text, and put a new one, if any, where the pattern ends."""
    found = place.search(text := BADGE.sub("", text))
    assert found, f"no {place.pattern} in {text[:80]!r}"
    return text[: found.end()] + (new and new + separator) + text[found.end() :]


def stamp(path: Path) -> bool:
    """Bring one notebook in line; return whether anything changed."""
    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    cells = [cell for cell in notebook.cells if not is_colab(cell)]
    old = next(filter(is_colab, notebook.cells), None)
    colab = old or nbformat.v4.new_code_cell(id=TAG)
    colab.source, colab.metadata = cell_source(), nbformat.from_dict(METADATA)
    cells[0].source = _after(FLOWER_BADGE, cells[0].source, badge(path.name), " · ")
    notebook.cells = [cells[0], colab, *cells[1:]]
    if nbformat.writes(notebook) == before:
        return False
    nbformat.write(notebook, path)
    return True


def main(arguments: Sequence[str]) -> None:
    """Set the address, if one is given, and bring the notebooks and the README in line."""
    parser = argparse.ArgumentParser(description="Write the course's address into the notebooks.")
    parser.add_argument(
        "repository", nargs="?", default="", help="https://github.com/you/your-fork"
    )
    parser.add_argument("branch", nargs="?", default="")
    given = parser.parse_args(arguments)
    repository, branch = given.repository.removesuffix("/").removesuffix(".git"), given.branch
    if repository not in ("", NONE) and not REPOSITORY.fullmatch(repository):
        sys.exit(
            f"REPOSITORY: expected https://github.com/OWNER/NAME, as Colab takes it, or {NONE}, "
            f"got {given.repository!r}"
        )
    if branch and not BRANCH.fullmatch(branch):
        sys.exit(f"BRANCH: expected the name of a branch or tag, such as main, got {branch!r}")
    new = repository or address()[0], branch or address()[1]
    if repository == NONE:
        new = "", "main"
    CELL.write_text(with_address(cell_source(), *new) + "\n", encoding="utf-8")
    changed = [p.name for p in sorted(HERE.glob("[0-9][0-9]-*.ipynb")) if stamp(p)]
    readme = README.read_text(encoding="utf-8")
    link = badge("00-start-here.ipynb", "_static")
    README.write_text(_after(TITLE, readme, link, "\n\n"), encoding="utf-8")
    print(f"{' '.join(new) if new[0] else 'no address'}: {len(changed)} notebooks changed")


if __name__ == "__main__":
    main(sys.argv[1:])
