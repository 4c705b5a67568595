"""What is in a newcomer's way is said in one line: who, what was expected, what came, what next."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import machine
from fedlib import processes
from fedlib.config import Config
from fedlib.results import RunDirectory
from fedlib.tracking import tracking

REPOSITORY = Path(__file__).resolve().parent.parent
OF_ANOTHER_VERSION = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[2])' "$@"
"""
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None or os.name != "posix", reason="no make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make needs of the repository, with nothing installed."""
    return copy_to(tmp_path / "course")


def copy_to(folder: Path) -> Path:
    names = ("Makefile", "requirements.txt", "fedlib/pyproject.toml", "tests/machine.py")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture
def installed(checkout: Path) -> Path:
    """The same; in its .venv are this Python and a flwr that says a word and stays."""
    script(checkout / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script(checkout / ".venv/bin/flwr", "#!/bin/sh\necho training\nsleep 60\n")
    (checkout / ".venv/.installed").touch()
    return checkout


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str, **environment: str) -> str:
    """Run make, which must fail, and return the one line that it says before make's own."""
    ended = subprocess.run(
        [str(MAKE), *arguments],
        cwd=folder,
        env={"PYTHON": sys.executable} | without_make() | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    lines = (ended.stdout + ended.stderr).splitlines()
    [line] = [line for line in lines if not line.startswith("make: ***")]
    return line


def without_make() -> dict[str, str]:
    """This environment, also where make started these tests."""
    ours = ("MAKE", "MFLAGS", "FLWR_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.mark.parametrize(("version", "name"), [("(3, 10, 9)", "3.10"), ("(3, 15, 0)", "3.15")])
def test_a_python_that_is_too_old_or_too_new(checkout: Path, version: str, name: str) -> None:
    text = OF_ANOTHER_VERSION.format(python=sys.executable, version=version)
    python = script(checkout / "python", text)
    assert make(checkout, "setup", f"PYTHON={python}") == (
        f"Python: expected 3.11 to 3.14, got {name}; try: make PYTHON=python3.12"
    )


def test_no_python(checkout: Path) -> None:
    assert make(checkout, "setup", "PYTHON=python9").startswith("python9: expected Python 3.11")


def test_a_python_without_venv(checkout: Path) -> None:
    (checkout / "without").mkdir()
    (checkout / "without/ensurepip.py").write_text("raise ImportError")
    line = make(checkout, "setup", PYTHONPATH=str(checkout / "without"))
    assert "expected the venv module" in line and "apt install python3-venv" in line


@pytest.mark.parametrize("name", ["two words", "course (1)", "a'b"])
def test_a_path_from_which_ray_cannot_start(tmp_path: Path, name: str) -> None:
    line = make(copy_to(tmp_path / name), "run")
    assert line.startswith("folder: expected a path without spaces") and name in line


def test_a_path_with_other_letters_is_none_of_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_to(tmp_path / "Köln-2.0_é+@"))
    monkeypatch.setattr(machine, "CUDA_GB", 0)
    monkeypatch.setattr(machine, "PLAIN_GB", 0)
    machine.setup(".venv")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, where nobody can write")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    with pytest.raises(SystemExit, match=r"^folder /proc: expected one that can be written, got:"):
        machine.setup(".venv")


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "CUDA_GB", 1e6)
    monkeypatch.setattr(machine, "PLAIN_GB", 1e6)
    with pytest.raises(SystemExit, match=r"expected 1e\+06 GB free for the installation, got \d"):
        machine.setup(".venv")


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="CUDA's build is not the rule"
)
def test_without_cuda_less_room_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "CUDA_GB", 1e6)
    monkeypatch.setattr(machine, "PLAIN_GB", 0)
    monkeypatch.setenv("UV_TORCH_BACKEND", "cpu")
    machine.setup(".venv")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken(installed: Path, taken: int) -> None:
    line = make(installed, "run", FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(taken))
    assert line.startswith(f"port {taken}: expected a free one")
    assert line.endswith("make run FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=39391")


@pytest.mark.parametrize("port", ["80x", "99999"])
def test_a_port_that_is_none(installed: Path, port: str) -> None:
    line = make(installed, "run", f"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT={port}")
    assert line.startswith(f"port {port}: expected a free one")


def test_a_number_of_processes_that_is_none(installed: Path) -> None:
    assert make(installed, "run", "PROCESSES=two", **a_port()).endswith("1 or more, got 'two'")


def a_port() -> dict[str, str]:
    return {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(processes.free_port())}


@pytest.mark.parametrize(
    ("client_gb", "advice"), [(0.3, "try: make run PROCESSES=2"), (5, "close other programs")]
)
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, client_gb: float, advice: str) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 2e9)
    monkeypatch.setattr(machine, "CLIENT_GB", client_gb)
    expected = rf"^memory: expected .* free for 16 client processes, got 2.0 GB; .*{advice}$"
    with pytest.raises(SystemExit, match=expected):
        machine.run(str(processes.free_port()), "16")


def test_free_memory_is_about_what_the_system_says() -> None:
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "3000",
            "memory.current": "1200",
            "memory.stat": "anon 5\ninactive_file 200",
        },
        {
            "memory.limit_in_bytes": "3000",
            "memory.usage_in_bytes": "1200",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 200",
        },
    ],
)
def test_a_control_groups_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.left_in(tmp_path) == 2000


@pytest.mark.parametrize("files", [{}, {"memory.max": "max", "memory.current": "1"}])
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in {"memory.stat": "anon 5", **files}.items():
        (tmp_path / name).write_text(text)
    assert machine.left_in(tmp_path) == float("inf")


def test_a_second_make_run_waits_for_nothing_and_ends_nothing(installed: Path) -> None:
    environment = {"PYTHON": sys.executable} | without_make() | a_port()
    with subprocess.Popen(
        [str(MAKE), "run"],
        cwd=installed,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Ctrl-C is ignored where the tests themselves run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    ) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == "training\n"
            line = make(installed, "run", **a_port())
            assert line.startswith("make run: expected to be the only one in this folder")
            assert first.poll() is None
        finally:
            os.killpg(first.pid, signal.SIGINT)
        assert first.wait(30) != 0
    script(installed / ".venv/bin/flwr", "#!/bin/sh\necho the next one starts\nexit 1\n")
    assert make(installed, "run", **a_port()) == "the next one starts"


def test_what_was_left_of_a_run_ends_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 1.0)
    stubborn = "#!/bin/sh\ntrap '' TERM\nsleep 60 & echo $!\nwait; wait\n"
    superlink = script(tmp_path / "flower-superlink", stubborn)
    environment = os.environ | {"FLWR_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for command in ([str(superlink)], ["sleep", "60"])
    ]
    try:
        child = psutil.Process(int(started[0].stdout.readline()))  # type: ignore[union-attr]
        processes.end_superlink(tmp_path)
        assert not psutil.pid_exists(started[0].pid)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert started[1].poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_misspelt_variable_of_wandb_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlien")
    directory = RunDirectory.create(Config(output_dir=str(tmp_path)))
    directory.describe("fashion-mnist", 2)
    began = time.monotonic()
    with tracking(True, directory):
        pass
    [line] = capsys.readouterr().out.splitlines()
    assert "environment variable WANDB_MODE: expected 'online', 'offline'," in line
    assert "got 'offlien'" in line and "goes on without it" in line
    assert time.monotonic() - began < 15
