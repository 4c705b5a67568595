"""The cell that brings fedlib to Google Colab.

A notebook is executed in a fresh environment that knows nothing of this repository, with a stand-in
for ``google.colab`` in its kernel and the course in a local archive. As a rule that environment
borrows this one's packages (all but fedlib), so that no network is needed. With
``COLAB_PYTHON=python3.12`` it is a new one that has what Colab has, and pip fetches the rest.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

import address
import refresh

REPOSITORY = address.HERE.parent
NOTEBOOK = address.HERE / "03-messages-and-records.ipynb"
PYTHON = os.environ.get("COLAB_PYTHON", "")
KEPT = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "psutil")
IGNORED = shutil.ignore_patterns("outputs", "wandb", "__pycache__", "*.egg-info", ".*")


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
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    if PYTHON:
        subprocess.run([PYTHON, "-m", "venv", root], check=True)
        names = (*KEPT[:-1], "psutil==5.9.5", "pandas", "ipykernel", "requests==2.32.4")
        subprocess.run([scripts / "python", "-m", "pip", "install", "-q", *names], check=True)
    else:
        venv.create(root)
    ask = [scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, check=True).stdout.decode().strip())
    (site / "google" / "colab").mkdir(parents=True)
    loaded = "import packaging.requirements, psutil, requests\n"  # in use while pip replaces them
    (site / "google" / "colab" / "__init__.py").write_text(loaded, encoding="utf-8")
    borrowed = "" if PYTHON else f"{sysconfig.get_path('purelib')}\n"
    (site / "zz_colab.pth").write_text(f"{borrowed}import google.colab\n", encoding="utf-8")
    (kernel := root / "kernels" / "colab").mkdir(parents=True)
    argv = [str(scripts / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    variables = refresh.environment(root) | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    if not PYTHON:  # what pip needs is borrowed, too
        variables |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        variables |= {"PIP_NO_BUILD_ISOLATION": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root))
        yield variables


def execute(notebook: NotebookNode, folder: Path, variables: dict[str, str]) -> None:
    """Execute a notebook in the stand-in for Colab, as if it had been uploaded alone."""
    client = NotebookClient(notebook, timeout=refresh.CELL_TIMEOUT_S, kernel_name="colab")
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute(env=variables)


def with_address(repository: str) -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source = address.with_address(address.cell_source(), repository, "main")
    return notebook


def test_a_notebook_that_is_opened_alone_brings_fedlib_and_runs(
    tmp_path: Path, archive: str, colab: dict[str, str]
) -> None:
    notebook, versions = with_address(archive), f"[version(name) for name in {KEPT}]"
    before = f"from importlib.metadata import version; versions = {versions}"
    after = f"import fedlib, course; print({versions} == versions, fedlib.__file__)"
    notebook.cells.insert(1, nbformat.v4.new_code_cell(before))
    notebook.cells.insert(3, nbformat.v4.new_code_cell(after))
    execute(notebook, tmp_path, colab)
    untouched, file = notebook.cells[3].outputs[0].text.split()
    assert untouched == "True" and "a.fork-main" in file
    for cell in refresh.code_cells(notebook):
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs


@pytest.mark.parametrize(
    ("repository", "words"),
    [
        ("", 'REPOSITORY = "https://github.com/you/fork", got none. Double-click'),
        ("file:///nowhere", "got file:///nowhere/archive/main.zip (<urlopen error"),
    ],
)
def test_without_a_right_address_it_says_what_to_do_in_one_line(
    repository: str, words: str, tmp_path: Path, colab: dict[str, str]
) -> None:
    notebook = with_address(repository)
    del notebook.cells[2:]
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path, colab)
    [error] = [o for o in notebook.cells[1].outputs if o.output_type == "error"]
    [line] = error.traceback
    assert words in line and "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_it_does_nothing(tmp_path: Path) -> None:
    code = "import sys, os; before = {*sys.modules}, os.getcwd(); exec(open(sys.argv[1]).read()); "
    code += "print(({*sys.modules}, os.getcwd()) == before)"
    command = [sys.executable, "-c", code, str(address.CELL)]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [b"True"] and list(tmp_path.iterdir()) == []
