"""CONTRIBUTING's promises: the hooks catch what they are for, make check and the workflow agree."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md")
[HOOKS] = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
BIN = Path(sys.executable).parent
MISSPELT = "Reci" + "eve"  # in two pieces, for codespell reads this too
NOTEBOOK = Path("notebooks", "05-one-round.ipynb")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    [lines] = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip() for line in lines.splitlines()]


def run(*command: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, and return what came of it."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )


# --- the hooks


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of what this folder holds, committed or not, but for what is ignored."""
    folder = tmp_path_factory.mktemp("clone")
    before = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        for path in runpy.run_path(".ci/files.py")["files"]():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path)
    finally:
        os.chdir(before)
    for command in ("init --quiet", "config user.name Newcomer", "config user.email n@example.org"):
        run("git", *command.split(), folder=folder)
    run("git", "add", "--all", folder=folder)
    return folder


@pytest.fixture
def check(clone: Path, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs the hooks there, without a network: there is nothing to fetch."""

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        command = (sys.executable, "-m", "pre_commit", "run", "--color=never", *arguments)
        return run(*command, folder=clone, PATH=path, PRE_COMMIT_HOME=str(tmp_path / "home"))

    return call


@needs_git
def test_all_files_pass_all_hooks(check: Callable[..., Any]) -> None:
    done = check("--all-files")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("...Passed") == len(HOOKS["hooks"]) == 4


def misspelt(path: Path) -> Path:
    path.with_name("page.md").write_text(f"{MISSPELT} the replies.\n", encoding="utf-8")
    return path.with_name("page.md")


def invalid(path: Path) -> Path:
    """Two cells of the same id, as copying one in a text editor makes them."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"].append(notebook["cells"][-1])
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    return path


def unformatted(path: Path) -> Path:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1] = nbformat.v4.new_code_cell("total = sum( [1,2] )", id=notebook.cells[-1].id)
    nbformat.write(notebook, path)
    return path


def unused(path: Path) -> Path:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1] = nbformat.v4.new_code_cell("import shelve", id=notebook.cells[-1].id)
    nbformat.write(notebook, path)
    return path


def large(path: Path) -> Path:
    path.with_name("weights.pt").write_bytes(bytes(2_000_000))
    return path.with_name("weights.pt")


@needs_git
@pytest.mark.parametrize(
    ("fault", "hook", "words"),
    [
        (misspelt, "codespell", f"{MISSPELT} ==> Receive"),
        (invalid, "files", "expected a valid notebook, got: "),
        (unformatted, "ruff-format", "would be reformatted"),
        (unused, "ruff-check", "`shelve` imported but unused"),
        (large, "files", "expected less than 500 kB, got 2000 kB"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_fails_the_hook_that_is_for_it(
    fault: Callable[[Path], Path], hook: str, words: str, check: Callable[..., Any], clone: Path
) -> None:
    before = (clone / NOTEBOOK).read_bytes()
    path = fault(clone / NOTEBOOK)
    try:
        done = check("--files", str(path.relative_to(clone)))
    finally:
        path.unlink()
        (clone / NOTEBOOK).write_bytes(before)
    assert done.returncode == 1
    assert re.findall("hook id: (.*)", done.stdout) == [hook], done.stdout
    assert words in done.stdout


@needs_git
@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links are for few there")
def test_a_commit_runs_them_though_the_environment_is_not_activated(clone: Path) -> None:
    home = {"PRE_COMMIT_HOME": str(clone / ".git" / "home")}
    (clone / ".venv").symlink_to(BIN.parent)
    installed = run(sys.executable, "-m", "pre_commit", "install", folder=clone, **home)
    assert installed.returncode == 0, installed.stdout
    (clone / "page.md").write_text(f"{MISSPELT} the replies.\n", encoding="utf-8")
    run("git", "add", "page.md", folder=clone)
    bare = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != str(BIN))
    done = run(
        "git", "commit", "--message=A page", "--", "page.md", folder=clone, PATH=bare, **home
    )
    assert done.returncode == 1
    assert re.findall("hook id: (.*)", done.stdout) == ["codespell"], done.stdout


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no sh")
def test_a_program_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    done = run("sh", str(REPOSITORY / ".ci" / "venv"), "rough", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == (
        "rough: expected in .venv or on the PATH, found in neither; make setup-dev\n"
    )


def test_make_check_runs_the_same_programs() -> None:
    in_make = [line.removeprefix("$(BIN)/") for line in recipe("check")]
    for hook in HOOKS["hooks"]:
        program = hook["entry"].removeprefix(".ci/venv ").replace("--force-exclude ", "")
        program = program.replace(" --force-exclude", "")
        assert any(line.startswith(program) for line in in_make), program


def test_the_files_are_checked_in_a_folder_without_git(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("outputs/\n*.log\n", encoding="utf-8")
    for name in ("outputs/latest.pt", "run.log", "deep/weights.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(600_000))
    done = run(sys.executable, str(REPOSITORY / ".ci" / "files.py"), folder=tmp_path)
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{Path('deep', 'weights.pt')}: expected less than 500 kB, got 600 kB")


# --- the workflow

FILE = REPOSITORY / ".github" / "workflows" / "course.yml"
WORKFLOW: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_workflow_follows_the_schema() -> None:
    check = ("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(FILE))
    done = run(sys.executable, *check, folder=REPOSITORY)
    assert done.returncode == 0, done.stdout


def test_its_commands_are_those_that_the_pages_tell_people() -> None:
    told = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in PAGES)
    commands = [line for step in STEPS if "run" in step for line in step["run"].splitlines()]
    assert {"make check", "make test"} <= set(commands)
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.MULTILINE), command
        assert command in told, command


def test_it_may_only_read_and_takes_no_longer_than_it_says() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in WORKFLOW["jobs"].values())
    assert all(job["timeout-minutes"] <= 120 for job in WORKFLOW["jobs"].values())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", s["uses"]) for s in STEPS if "uses" in s)


def test_it_tries_the_oldest_python_that_fedlib_takes() -> None:
    project = tomllib.loads((REPOSITORY / "fedlib" / "pyproject.toml").read_text("utf-8"))
    oldest = project["project"]["requires-python"].removeprefix(">=").split(",")[0]
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"][0] == oldest
    assert {"os": "windows-latest", "python": oldest} in matrix["include"]
