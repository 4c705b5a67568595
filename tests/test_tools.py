"""What is in a newcomer's way is said in one line, and make's own programs do what they say."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

import address
import machine
import refresh
import run
from course.watcher import with_variable

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(address.HERE.glob("[0-9][0-9]-*.ipynb"))
FORK = "https://github.com/somebody/a.fork"
RUN = [sys.executable, str(REPOSITORY / "tools" / "run.py"), "--nodes", "2"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


# --- make setup


@pytest.mark.parametrize(
    ("folder", "version", "room", "modules", "line"),
    [
        ("Köln-2.0_é+@", (3, 14), 0, {}, None),
        ("course", (3, 10), 0, {}, r"Python: expected 3.11 to 3.14, got 3\.10; try: make PYTHON="),
        ("course", (3, 12), 0, {"ensurepip": None}, r"the venv module; .* apt install python3-v"),
        ("two words", (3, 12), 0, {}, r"folder: expected a path without spaces .* got ' ' in "),
        ("course", (3, 12), 1e6, {}, r"disk of .*: expected 1e\+06 GB free .*, got \d"),
    ],
)
def test_what_is_in_the_way_of_an_installation_is_one_line(
    folder: str,
    version: tuple[int, int],
    room: float,
    modules: dict[str, None],
    line: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(machine, "CUDA_GB", room)
    monkeypatch.setattr(machine, "PLAIN_GB", room)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    if line is None:
        return machine.check()
    with pytest.raises(SystemExit, match=line) as stopped:
        machine.check()
    assert "\n" not in str(stopped.value)


# --- make run


@pytest.mark.parametrize(
    ("client_gb", "advice"), [(0.3, "try: make run PROCESSES=2"), (5, "close other programs")]
)
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, client_gb: float, advice: str) -> None:
    monkeypatch.setattr(run, "free_memory", lambda: 2e9)
    monkeypatch.setattr(run, "CLIENT_GB", client_gb)
    with pytest.raises(SystemExit, match=rf"for 16 client processes, got 2.0 GB; .*{advice}$"):
        run.check_memory(16)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1200\n", encoding="utf-8")
    (tmp_path / "memory.max").write_text("3000\n", encoding="utf-8")
    assert run.free_memory(tmp_path) == 1800
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert 1800 < run.free_memory(tmp_path) <= psutil.virtual_memory().total


def test_a_run_that_fails_ends_with_1_and_says_why() -> None:
    for config, words in (
        ("seed=[", b"invalid format"),
        ("seed=3 local-epoch=3", b"unknown key 'local-epoch'; did you mean local-epochs?"),
    ):
        failed = subprocess.run([*RUN, "--config", config], capture_output=True, check=False)
        assert failed.returncode == 1
        assert words in failed.stdout + failed.stderr


@pytest.mark.skipif(os.name != "posix", reason="another kind of signals")
def test_two_runs_do_not_meet_and_one_that_is_ended_leaves_no_process() -> None:
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        own = os.environ | {"ENDED_BY": str(number)}
        runs[number] = subprocess.Popen(
            RUN, env=own, stdout=subprocess.PIPE, start_new_session=True
        )
    for process in runs.values():
        assert any(b"Starting local SuperLink" in line for line in process.stdout or ())
    for number, process in runs.items():
        os.killpg(process.pid, number)
    for number, process in runs.items():
        process.communicate()
        assert process.returncode == 128 + number
        assert str(number) not in [value for _, value in with_variable("ENDED_BY")]


# --- make address, make notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_begins_with_colabs_cell_folded(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert [cell for cell in cells if address.is_colab(cell)] == [cells[1]]
    assert cells[1].source == address.cell_source(), "run: make address"
    assert dict(cells[1].metadata) == address.METADATA and cells[1].outputs == []


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what an address is written into."""
    (tmp_path / "notebooks").mkdir()
    for path in (address.CELL, address.README, *NOTEBOOKS):
        shutil.copy(path, tmp_path / ("notebooks" if path in NOTEBOOKS else ""))
    monkeypatch.setattr(address, "HERE", tmp_path / "notebooks")
    monkeypatch.setattr(address, "CELL", tmp_path / "colab.py")
    monkeypatch.setattr(address, "README", tmp_path / "README.md")
    address.main([])
    return tmp_path


def test_a_forks_address_is_written_everywhere_and_taken_back(copy: Path) -> None:
    before = {path: path.read_text(encoding="utf-8") for path in copy.rglob("*.*")}
    address.main([f"{FORK}.git", "my/branch"])
    for path in (copy / "notebooks").iterdir():
        notebook, old = nbformat.read(path, 4), nbformat.reads(before[path], 4)
        assert f'REPOSITORY = "{FORK}"\nBRANCH = "my/branch"\n' in notebook.cells[1].source
        target = f"/github/somebody/a.fork/blob/my/branch/notebooks/{path.name})"
        assert notebook.cells[0].source.count(f"colab.research.google.com{target}") == 1
        assert refresh.stamp(notebook) == refresh.stamp(old), "outputs are as fresh as before"
    assert (copy / "README.md").read_text("utf-8").count("colab.research.google.com/") == 1
    address.main(["none"])
    assert before == {path: path.read_text(encoding="utf-8") for path in before}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["https://gitlab.com/somebody/fork"], "got 'https://gitlab.com/somebody/fork'$"),
        (["https://github.com/../.."], "^REPOSITORY: expected https://github.com/OWNER"),
        ([FORK, 'main", evil="'], "^BRANCH: expected the name of a branch"),
    ],
)
def test_a_wrong_address_is_one_line_and_changes_nothing(
    copy: Path, arguments: list[str], words: str
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.*")}
    with pytest.raises(SystemExit, match=words):
        address.main(arguments)
    assert before == {path: path.read_bytes() for path in before}
