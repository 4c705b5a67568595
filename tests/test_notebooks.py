"""What every notebook keeps: its shape, fresh outputs, true numbers, exercises with answers."""

import ast
import itertools
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
import pytest
import refresh
from address import BADGE, is_colab
from nbformat import NotebookNode
from refresh import COST

from test_package import PUBLIC_FLOWER

FOLDER = Path(refresh.__file__).parent
NAMES = (
    *("00-start-here", "01-fifty-data-sets", "02-model-and-training", "03-messages-and-records"),
    *("04-the-client-app", "05-one-round", "06-aggregation", "07-query-and-opt-in"),
    *("08-the-round-loop", "09-tracking-and-plots", "10-from-notebook-to-app", "11-deployment"),
)
NOTEBOOKS = [FOLDER / f"{name}.ipynb" for name in NAMES]
OPENING = (
    "**You will build** ",
    "**You need to know** ",
    "**It takes** ",
    "](../_static/badge.svg)",
)
CLOSING = ("What you learned", "Three questions", "What comes next", "Further reading")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/<>])(/(home|root|tmp|work|Users|usr|var|opt|private)/|[A-Z]:\\)"
)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    """The notebook without its cell and badge for Colab, which test_colab.py looks at."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not is_colab(cell)]
    notebook.cells[0].source = BADGE.sub("", notebook.cells[0].source)
    return notebook


def prose(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def tagged(notebook: NotebookNode, kind: str) -> dict[int, NotebookNode]:
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(f"{kind}-"):
                found[int(tag.removeprefix(f"{kind}-"))] = cell
    return found


def texts(cell: NotebookNode) -> Iterator[str]:
    """What a code cell's outputs say in words."""
    for output in cell.outputs:
        yield output.get("text", "")
        for mime, value in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield value


def pictures(notebook: NotebookNode) -> list[NotebookNode]:
    return [
        output
        for cell in refresh.code_cells(notebook)
        for output in cell.outputs
        if any(mime.startswith("image/") for mime in output.get("data", {}))
    ]


def test_the_course_has_its_ten_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@each
def test_it_is_a_valid_notebook_for_any_python_kernel(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each
def test_its_outputs_show_everywhere_without_a_script(path: Path) -> None:
    """Text and pictures: VS Code, the repository's web view and the book run no JavaScript."""
    for cell in refresh.code_cells(read(path)):
        for output in cell.outputs:
            assert set(output.get("data", {})) <= {"text/plain", "text/html", "image/png"}
            assert not re.search(r"<script|\bon\w+=|javascript:", str(output), re.I)


@each
def test_it_is_committed_executed_from_top_to_bottom(path: Path) -> None:
    cells = refresh.code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr", output.text


@each
def test_its_outputs_are_no_older_than_its_code_and_fedlibs_api(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.get("stamp") == refresh.stamp(notebook), "run: make notebooks"


@each
def test_its_outputs_are_the_same_on_every_machine(path: Path) -> None:
    for cell in refresh.code_cells(read(path)):
        for output in cell.outputs:
            assert refresh.WIDGET not in output.get("data", {})
        for text in texts(cell):
            for unwanted in (ABSOLUTE_PATH, r"Warning", r"\d{4}-\d\d-\d\d", r"\d\d:\d\d:\d\d"):
                assert not re.search(unwanted, text), text


@each
def test_it_has_the_size_that_one_reads_in_one_go(path: Path) -> None:
    notebook = read(path)
    cells = refresh.code_cells(notebook)
    lines = [len(cell.source.splitlines()) for cell in cells]
    words = sum(len(visible(cell).split()) for cell in prose(notebook))
    assert 35 <= len(notebook.cells) <= 60
    assert max(lines) <= 30
    assert statistics.median(lines) <= 8
    assert 900 <= words <= 1_800
    assert len(pictures(notebook)) >= 2
    assert sum(cell.source.count("run_simulation(") for cell in cells) <= 2
    assert path.stat().st_size < 600_000


@each
def test_code_is_introduced_by_prose_and_answers_with_something(path: Path) -> None:
    notebook = read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    checks = [id(cell) for cell in tagged(notebook, "check").values()]
    code = [n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    alone = [n for n in code if kinds[n - 1] == "code" and id(notebook.cells[n]) not in checks]
    silent = [n for n in code if not notebook.cells[n].outputs]
    assert len(alone) <= 0.2 * len(code)
    assert len(silent) <= 0.5 * len(code)


@each
def test_it_opens_and_closes_as_all_do(path: Path) -> None:
    notebook = read(path)
    opening = notebook.cells[0].source
    assert opening.startswith(f"# {path.stem[:2]} · ")
    assert all(part in opening for part in OPENING)
    assert COST.search(opening)
    parts = re.split(r"^## (.*)$", all_prose(path), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert tuple(sections)[-4:] == CLOSING
    assert sections["Three questions"].count("<details>") == 3
    assert len(re.findall(r"^[-*1-9]", sections["What you learned"], re.M)) == 5
    assert 2 <= len(re.findall(r"\]\(https?://", sections["Further reading"])) <= 4


@each
def test_its_headings_go_down_one_level_at_a_time(path: Path) -> None:
    source = "\n".join(re.sub(r"```.*?```", "", c.source, flags=re.S) for c in prose(read(path)))
    levels = [len(marks) for marks in re.findall(r"^(#+) ", source, re.M)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@each
def test_every_picture_has_words(path: Path) -> None:
    notebook = read(path)
    for picture in pictures(notebook):
        assert len(picture.metadata.get("image/png", {}).get("alt", "").split()) >= 5
    for cell in prose(notebook):
        assert not re.search(r"!\[\s*\]\(", cell.source)


@each
def test_its_links_inside_the_course_lead_somewhere(path: Path) -> None:
    for cell in prose(read(path)):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", cell.source):
            assert (FOLDER / target).exists(), target


@each
def test_only_flowers_public_modules_are_imported(path: Path) -> None:
    for cell in refresh.code_cells(read(path)):
        for module in re.findall(r"(?:from|import) (flwr(?:\.\w+)*)(?!\w)", cell.source):
            assert ".".join(module.split(".")[:2]) in PUBLIC_FLOWER


@each
def test_it_does_not_define_what_another_notebook_defines(path: Path) -> None:
    assert not definitions(path) & set().union(*(definitions(p) for p in NOTEBOOKS if p != path))


@cache
def definitions(path: Path) -> set[str]:
    """The bodies of a notebook's functions and classes that are longer than two lines."""
    trees = (ast.parse(magicless(cell)) for cell in refresh.code_cells(read(path)))
    return {
        ast.dump(ast.Module(node.body, []))
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(node.body) > 2
    }


def magicless(cell: NotebookNode) -> str:
    return re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M)


@each
def test_its_exercises_have_a_stub_a_check_a_hint_and_a_solution(path: Path) -> None:
    notebook = read(path)
    stubs, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    solutions = tagged(notebook, "solution")
    assert 2 <= len(stubs) <= 3
    assert list(stubs) == list(checks) == list(solutions) == list(range(1, len(stubs) + 1))
    for number, stub in stubs.items():
        assert "..." in stub.source
        assert "".join(texts(checks[number])).startswith("⏳")
        assert "<summary>Hint</summary>" in solutions[number].source
        assert "<summary>Solution</summary>" in solutions[number].source


# --- numbers in prose come from the outputs


def visible(cell: NotebookNode) -> str:
    """Prose as it is read: without code, the addresses of links and the marks of HTML."""
    text = re.sub(r"```.*?```", " ", cell.source, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]", " ", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"<[^>\n]*>", " ", text)


def claims(cell: NotebookNode) -> Iterator[str]:
    """The numbers in prose that were measured: with a decimal point, a % sign, or 100 or more.

    A paragraph with a link cites its numbers; code spans are code, and formulas are formulas.
    """
    for paragraph in re.split(r"\n\s*\n", cell.source):
        if re.search(r"https?://|arXiv", paragraph):
            continue
        text = visible(nbformat.v4.new_markdown_cell(COST.sub("", paragraph)))
        text = re.sub(r"`[^`]*`|\$[^$]*\$", " ", text)
        for number, percent in re.findall(
            r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)(?![\w-])\s*(%?)", text
        ):
            plain = number.replace(",", "").rstrip(".")
            if percent or "." in plain or float(plain) >= 100:
                yield plain + percent


def occurs(claim: str, numbers: set[float]) -> bool:
    """Is there a number that is this one, rounded to its digits, or a share of one as percent?"""
    percent, digits = claim.endswith("%"), claim.rstrip("%")
    decimals = len(digits.partition(".")[2])
    scales = (1, 100) if percent else (1,)
    return any(
        abs(scale * number - float(digits)) <= 0.5000001 * 10**-decimals
        for number in numbers
        for scale in scales
    )


@each
def test_every_number_in_the_prose_is_one_that_a_cell_printed(path: Path) -> None:
    notebook = read(path)
    cells = refresh.code_cells(notebook)
    printed = "\n".join(text for cell in cells for text in (cell.source, *texts(cell)))
    found = re.findall(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?", printed)
    numbers = {float(number.replace(",", "").replace("_", "").rstrip(".")) for number in found}
    unproved = [c for cell in prose(notebook) for c in claims(cell) if not occurs(c, numbers)]
    assert not unproved


# --- the pages around them


def test_the_readme_says_what_each_notebook_takes() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    stated = dict(
        re.findall(r"^\| \d\d \| .*\]\(notebooks/([\w-]+)\.ipynb\).* \| (\d+) s \|$", readme, re.M)
    )
    costs = {path.stem: COST.search(read(path).cells[0].source) for path in NOTEBOOKS}
    assert all(costs.values())
    assert stated == {name: cost[1] for name, cost in costs.items()}


def glossary() -> list[tuple[str, str, str]]:
    """Term, explanation and notebook of every entry."""
    text = (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8")
    return re.findall(r"^\*\*(.+?)\*\* ?[:·] (.+?) \[\d\d\]\(([\w-]+)\.ipynb\)$", text, re.M)


def test_the_glossary_is_in_order_and_explains_in_two_sentences() -> None:
    entries = glossary()
    assert len(entries) >= 40
    terms = [term.lower() for term, _, _ in entries]
    assert terms == sorted(terms)
    for term, explanation, _ in entries:
        assert len(re.findall(r"[.?](?= |$)", explanation)) == 2, term


@cache
def all_prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in prose(read(path)))


@pytest.mark.parametrize(("term", "_", "name"), glossary(), ids=lambda value: value[:30])
def test_a_term_of_the_glossary_first_appears_where_it_says(term: str, _: str, name: str) -> None:
    """In prose; 00 names many things in passing, so it counts for the terms that it explains."""
    spelt = term.partition(" (")[0]
    word = re.compile(rf"(?<![\w-]){re.escape(spelt)}", 0 if spelt.isupper() else re.I)
    places = [path.stem for path in NOTEBOOKS if word.search(all_prose(path))]
    assert name in (places[0], next((place for place in places if place[:2] != "00"), ""))
