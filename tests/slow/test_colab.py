"""The cell that brings fedlib to Google Colab, and the one place where the address is set.

The notebooks are executed in a fresh environment that knows nothing of this repository, with a
stand-in for ``google.colab`` in its kernel and the course in a local archive. As a rule that
environment borrows this one's packages (all but fedlib), so that no network is needed. With
``COLAB_PYTHON=python3.12`` it is a new one that has what Colab has, and pip fetches the rest.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import address
import nbformat
import pytest
import refresh
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from test_notebooks import NOTEBOOKS, each

REPOSITORY = Path(refresh.__file__).resolve().parent.parent
FORK = "https://github.com/somebody/a.fork"
PYTHON = os.environ.get("COLAB_PYTHON", "")
"""Such as python3.12; then all notebooks are executed, in a new environment, with a network."""
PREINSTALLED = (
    *("torch", "torchvision", "numpy", "matplotlib", "pandas", "ipykernel", "ipywidgets"),
    *("packaging", "psutil==5.9.5", "requests==2.32.4"),
)
IGNORED = shutil.ignore_patterns("outputs", "wandb", "__pycache__", "*.egg-info", ".*")


@each
def test_each_notebook_begins_with_the_cell_and_shows_it_folded(path: Path) -> None:
    [cell] = [c for c in nbformat.read(path, as_version=4).cells if address.is_colab(c)]
    assert nbformat.read(path, as_version=4).cells[1] == cell
    assert cell.source == address.cell_source(), "run: make address"
    assert dict(cell.metadata) == address.METADATA
    assert cell.outputs == []


def test_the_committed_badges_are_those_of_the_address() -> None:
    for path in (*NOTEBOOKS, REPOSITORY / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert text.count("colab.research.google.com") == (1 if address.address()[0] else 0), path


# --- make address


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the address is written into."""
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks", ignore=IGNORED)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    return tmp_path


def set_address(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, checkout / "notebooks" / "address.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_command_writes_a_forks_address_everywhere(checkout: Path) -> None:
    stamps = {path.name: refresh.stamp(nbformat.read(path, 4)) for path in NOTEBOOKS}
    done = set_address(checkout, f"{FORK}.git", "main")
    assert done.stdout == f"{FORK} main: 12 notebooks changed\n", done.stderr
    set_address(checkout, "", "my/branch")
    for path in (checkout / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        assert f'REPOSITORY = "{FORK}"\nBRANCH = "my/branch"\n' in notebook.cells[1].source
        target = f"github/somebody/a.fork/blob/my/branch/notebooks/{path.name})"
        assert notebook.cells[0].source.count("colab.research.google.com/") == 1
        assert f"colab.research.google.com/{target}" in notebook.cells[0].source
        assert refresh.stamp(notebook) == stamps[path.name], "outputs are as fresh as before"
    assert (checkout / "README.md").read_text("utf-8").count("colab.research.google.com/") == 1
    assert set_address(checkout, FORK, "my/branch").stdout.endswith(": 0 notebooks changed\n")
    unset = set_address(checkout, "none")
    assert unset.stdout.startswith("no address: ") and address.ADDRESS.search(
        (checkout / "notebooks" / "colab.py").read_text(encoding="utf-8")
    ).groups() == ("", "main")
    assert "colab.research.google.com" not in (checkout / "README.md").read_text("utf-8")
    set_address(checkout, FORK, "my/branch")
    ruff = [sys.executable, "-m", "ruff", "format", "--check"]
    config = ["--config", REPOSITORY / "pyproject.toml"]
    subprocess.run([*ruff, *config, checkout / "notebooks"], check=True)  # make check stays green


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["git@github.com:somebody/fork.git"], "REPOSITORY: expected https://github.com/OWNER"),
        (["https://gitlab.com/somebody/fork"], "got 'https://gitlab.com/somebody/fork'"),
        (["https://github.com/../.."], "REPOSITORY: expected"),
        ([FORK, "/"], "BRANCH: expected the name of a branch"),
        ([FORK, 'main", evil="'], "BRANCH: expected the name of a branch"),
    ],
)
def test_a_wrong_address_is_one_line_and_changes_nothing(
    checkout: Path, arguments: list[str], words: str
) -> None:
    before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()}
    done = set_address(checkout, *arguments)
    assert done.returncode != 0
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert before == {p: p.read_bytes() for p in before}


# --- in Colab


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The course in an archive of the shape that GitHub serves; return the repository's address."""
    root = tmp_path_factory.mktemp("github")
    for name in ("fedlib", "notebooks", "_static"):
        shutil.copytree(REPOSITORY / name, root / "a.fork-main" / name, ignore=IGNORED)
    shutil.make_archive(str(root / "archive" / "main"), "zip", root, "a.fork-main")
    return root.as_uri()


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A fresh environment with a kernel in which google.colab is loaded; return its variables."""
    root = tmp_path_factory.mktemp("colab")
    if PYTHON:
        subprocess.run([PYTHON, "-m", "venv", root], check=True)
        pip = [root / "bin" / "python", "-m", "pip", "install", "--quiet", *PREINSTALLED]
        subprocess.run(pip, check=True)
    else:
        venv.create(root)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (site / "google" / "colab").mkdir(parents=True)
    loaded = "import packaging.requirements, psutil, requests\n"  # in use while pip replaces them
    (site / "google" / "colab" / "__init__.py").write_text(loaded, encoding="utf-8")
    borrowed = "" if PYTHON else f"{sysconfig.get_path('purelib')}\n"
    (site / "zz_colab.pth").write_text(f"{borrowed}import google.colab\n", encoding="utf-8")
    kernel = root / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    variables = refresh.environment(root) | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    if not PYTHON:  # what pip needs is borrowed, too
        pip_alone = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        variables |= pip_alone | {"PIP_NO_BUILD_ISOLATION": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root))
        yield variables


def execute(notebook: NotebookNode, folder: Path, variables: dict[str, str]) -> None:
    """Execute a notebook in the stand-in for Colab, as if it had been uploaded alone."""
    client = NotebookClient(notebook, timeout=refresh.CELL_TIMEOUT_S, kernel_name="colab")
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute(env=variables)


def with_address(path: Path, repository: str, branch: str = "main") -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = address.with_address(notebook.cells[1].source, repository, branch)
    return notebook


@pytest.mark.parametrize(
    "path", NOTEBOOKS if PYTHON else [NOTEBOOKS[3]], ids=lambda path: path.stem
)
def test_a_notebook_that_is_opened_alone_brings_fedlib_and_runs(
    path: Path, tmp_path: Path, archive: str, colab: dict[str, str]
) -> None:
    notebook = with_address(path, archive)
    versions = "[version(name) for name in ('torch', 'torchvision', 'numpy')]"
    before = f"from importlib.metadata import version; own = {versions}"
    after = f"import fedlib; print({versions} == own, fedlib.__file__)"
    notebook.cells.insert(1, nbformat.v4.new_code_cell(before))
    notebook.cells.insert(3, nbformat.v4.new_code_cell(after))
    execute(notebook, tmp_path, colab)
    untouched, file = notebook.cells[3].outputs[0].text.split()
    assert untouched == "True"
    assert "a.fork-main" in file
    for cell in refresh.code_cells(notebook):
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs


@pytest.mark.parametrize(
    ("repository", "words"),
    [
        ("", 'REPOSITORY = "https://github.com/you/fork", got none. Double-click'),
        ("file:///nowhere", "got file:///nowhere/archive/main.zip (<urlopen error"),
        ("https://github.com/you/my fork", "can't contain control characters"),
    ],
)
def test_without_a_right_address_it_says_what_to_do_in_one_line(
    repository: str, words: str, tmp_path: Path, colab: dict[str, str]
) -> None:
    assert words in refusal(with_address(NOTEBOOKS[0], repository), tmp_path, colab)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["damaged", "something else"])
def test_after_a_wrong_archive_the_right_one_is_taken(
    wrong: str, tmp_path: Path, archive: str, colab: dict[str, str]
) -> None:
    (tmp_path / "wrong" / "archive").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "wrong" / "archive" / "main.zip", "w") as file:
        file.writestr("wrong-main/README.md", "not the course")
    if wrong == "damaged":
        (tmp_path / "wrong" / "archive" / "main.zip").write_bytes(b"PK not really")
    address_of_it = (tmp_path / "wrong").as_uri()
    said = refusal(with_address(NOTEBOOKS[0], address_of_it), tmp_path, colab)
    assert f"got {address_of_it}/archive/main.zip (" in said
    notebook = with_address(NOTEBOOKS[0], archive)
    notebook.cells[2:] = [nbformat.v4.new_code_cell("import os; print(os.getcwd())")]
    execute(notebook, tmp_path, colab)
    assert notebook.cells[2].outputs[0].text.endswith("a.fork-main/notebooks\n")


def refusal(notebook: NotebookNode, folder: Path, variables: dict[str, str]) -> str:
    """What the cell for Colab says, in one line, when it cannot go on."""
    del notebook.cells[2:]
    with pytest.raises(CellExecutionError):
        execute(notebook, folder, variables)
    [error] = [o for o in notebook.cells[1].outputs if o.output_type == "error"]
    assert len(error.traceback) == 1 and "\n" not in error.traceback[0]
    return str(error.traceback[0])


def test_elsewhere_it_does_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, os; before = set(sys.modules), os.getcwd(); exec(open(sys.argv[1]).read()); "
    )
    code += "print((set(sys.modules), os.getcwd()) == before)"
    command = [sys.executable, "-c", code, str(address.CELL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "True\n"
    assert list(tmp_path.iterdir()) == []
