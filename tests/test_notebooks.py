"""What every notebook keeps: its shape, fresh outputs, true numbers, exercises with answers."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

import refresh
from address import BADGE, is_colab
from refresh import COST

FOLDER = refresh.HERE
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))
OPENING = ("**You will build** ", "**You need to know** ", "](../_static/badge.svg)")
CLOSING = (
    *("Change one line", "What you learned"),
    *("Three questions", "What comes next", "Further reading"),
)
EXERCISE = re.compile(r"^### Exercise (\d+): .+\n\n(.*)$", re.M)
DIFFICULTY = re.compile(r"\*(★☆☆|★★☆|★★★) · [1-9]\d* minutes\*")
MINUTES = re.compile(r"\*\*It takes\*\* about (\d+) minutes")
STARTS_PROCESSES = re.compile(r"\b(?:simulate|FlowerHome|Deployment)\(")
PUBLIC_FLOWER = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation")
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


def solution_code(cell: NotebookNode) -> str:
    """The one block of Python in a folded solution."""
    [code] = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
    return str(code)


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
def test_its_outputs_are_no_older_than_its_code(path: Path) -> None:
    notebook = read(path)
    stamp = notebook.metadata.get("stamp")
    assert stamp == refresh.stamp(notebook), f"run: make notebooks ONLY={path.name}"


@each
def test_its_outputs_are_the_same_on_every_machine(path: Path) -> None:
    for cell in refresh.code_cells(read(path)):
        for output in cell.outputs:
            assert refresh.WIDGET not in output.get("data", {})
        for text in texts(cell):
            for unwanted in (ABSOLUTE_PATH, r"Warning", r"\d{4}-\d\d-\d\d", r"\d\d:\d\d:\d\d"):
                assert not re.search(unwanted, text), text


@each
def test_it_opens_and_closes_as_all_do(path: Path) -> None:
    notebook = read(path)
    opening = notebook.cells[0].source
    assert opening.startswith(f"# {path.stem[:2]} · ")
    assert all(part in opening for part in OPENING)
    assert MINUTES.search(opening) and COST.search(opening)
    parts = re.split(r"^## (.*)$", "\n\n".join(c.source for c in prose(notebook)), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert tuple(sections)[-5:] == CLOSING
    assert len(re.findall(r"^- .*[?]", sections["Change one line"], re.M)) == 2
    assert sections["Three questions"].count("<details>") == 3
    assert re.search(r"\]\(https?://", sections["Further reading"])


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
def test_its_exercises_have_a_stub_a_check_a_hint_and_a_solution(path: Path) -> None:
    notebook = read(path)
    stubs, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    solutions = tagged(notebook, "solution")
    assert list(stubs) == list(checks) == list(solutions) == list(range(1, len(stubs) + 1))
    for number, stub in stubs.items():
        assert "..." in stub.source
        assert "".join(texts(checks[number])).startswith("⏳")
        assert "<summary>Hint</summary>" in solutions[number].source
        assert "<summary>Solution</summary>" in solutions[number].source


@each
def test_each_exercise_says_how_hard_it_is_and_how_long_it_takes(path: Path) -> None:
    notebook = read(path)
    found = EXERCISE.findall("\n\n".join(cell.source for cell in prose(notebook)))
    assert [int(number) for number, _ in found] == list(tagged(notebook, "exercise"))
    assert [line for _, line in found if not DIFFICULTY.fullmatch(line)] == []


@each
def test_where_processes_are_started_there_is_help_by_symptom(path: Path) -> None:
    notebook = read(path)
    if any(STARTS_PROCESSES.search(cell.source) for cell in refresh.code_cells(notebook)):
        text = "\n".join(cell.source for cell in prose(notebook))
        assert "<details><summary>If it does not work</summary>" in text


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


# --- the page around them


def test_the_readme_says_how_many_seconds_each_notebook_takes() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\|.*\(notebooks/([\w-]+)\.ipynb\).* (\d+) s \|$", readme, re.M)
    costs = [(p.stem, COST.search(read(p).cells[0].source)) for p in NOTEBOOKS]
    assert stated == [(name, cost[1]) for name, cost in costs if cost]


def test_the_times_of_the_paths_through_the_course_are_sums_of_the_notebooks_own() -> None:
    text = "\n".join(cell.source for cell in prose(read(NOTEBOOKS[0])))
    rows = re.findall(r"^\|[^|]*\| ([^|]*) \|[^|]*\| (\d+) hours \| (\d+) minutes \|$", text, re.M)
    heads = [read(path).cells[0].source for path in NOTEBOOKS]
    costs = [[int(pattern.findall(head)[0]) for head in heads] for pattern in (MINUTES, COST)]
    sums = []
    for which, *_ in rows:
        numbers = list[int]()
        for first, last in re.findall(r"(\d\d)(?: to (\d\d))?", which):
            numbers += range(int(first), int(last or first) + 1)
        sums.append((which, *(str(round(sum(cost[n] for n in numbers) / 60)) for cost in costs)))
    assert rows == sums
    assert rows[-1][0] == f"00 to {NOTEBOOKS[-1].stem[:2]}"
