"""Whatever ends a program, what it started ends too; and ``make stop`` ends what is left."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from course import FlowerHome, watcher
from fedlib import FedlibError

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX, fork")

PROGRAM = """
import os, time
from course import FlowerHome
home = FlowerHome()
(home.folder / "key").write_text("secret")
home.start_process("child", "python", "-c", "import time; time.sleep(600)")
fork = os.fork() or time.sleep(600)  # which is not ours to end
print(fork, flush=True)
assert input()
time.sleep(600)
"""


def left(temporary: Path) -> list[object]:
    """What is in a folder for temporary files, and the processes that know it."""
    known = watcher.with_variable("TMPDIR")
    return [*temporary.rglob("*"), *[p.pid for p, folder in known if folder == str(temporary)]]


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """Folders for temporary files are in there; whoever still knows them is killed at last."""
    yield tmp_path
    for process, folder in watcher.with_variable("TMPDIR"):
        if tmp_path in Path(folder).parents:
            process.kill()


@posix
def test_however_a_program_ends_its_processes_and_its_folder_go_within_seconds(
    temporary: Path,
) -> None:
    """Even though a fork of the program lives on, and holds whatever the program had open."""
    programs = {}
    for ending in ("an exception", signal.SIGTERM, signal.SIGKILL):
        (folder := temporary / str(ending)).mkdir()
        programs[ending] = (
            folder,
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ),
        )
    for ending, (folder, program) in programs.items():
        assert program.stdin and program.stdout
        fork = int(program.stdout.readline())
        assert len(list(folder.glob("*/key"))) == 1 and len(left(folder)) > 3
        if isinstance(ending, signal.Signals):
            program.send_signal(ending)
        else:
            print(file=program.stdin, flush=True)
        deadline = time.monotonic() + 5
        while program.poll() is None or left(folder) != [fork]:
            assert time.monotonic() < deadline, f"{ending}: {left(folder)}"
            time.sleep(0.05)


def test_what_was_closed_starts_nothing_that_nobody_would_end() -> None:
    home = FlowerHome()
    home.close()
    home.close()
    for start in (home.flwr, lambda name: home.start_process(name, "python", "-c", "")):
        with pytest.raises(FedlibError, match="expected an open FlowerHome, got one that was clo"):
            start("list")
    assert not home.folder.exists()


def test_a_command_runs_as_in_a_terminal_and_ends_at_the_words_that_end_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
import os, time
print("INFO :  a note of Flower's", flush=True)
print(f"\\x1b[31m{os.environ['COURSE']}\\x1b[0m in {os.environ['FLWR_HOME']}", flush=True)
print(os.getcwd(), "is where it ends", flush=True)
time.sleep(600)
"""
    with FlowerHome() as home:
        command = shlex.join(["python", "-c", program])
        output = home.shell(command, folder=tmp_path, until="it ends", COURSE="red")
        with pytest.raises(FedlibError, match=r"expected an end within 0\.5 s"):
            home.shell(command, timeout_s=0.5, COURSE="blue")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["red in <flower>", f"{tmp_path} is where it ends"]
    assert printed[2].startswith("[exit status ") and "[exit status 0]" not in printed
    assert output.startswith("INFO") and f"red in {home.folder}" in output


def test_a_census_knows_names_parents_folders_and_variables() -> None:
    with FlowerHome(COURSE="yes") as home:
        program = home.folder / "sleeper.run"
        program.write_text("import time; time.sleep(600)", encoding="utf-8")
        process = home.start_process("sleeper", "python", str(program))
        home.wait_until_at_most(1)
        [seen] = home.census()
        assert (seen.name, seen.pid, seen.parent) == ("sleeper", process.pid, os.getpid())
        assert (seen.folder, seen.environment["COURSE"]) == (Path.cwd(), "yes")
        assert abs(seen.born - process.create_time()) < 1
    assert home.census() == []


@posix
def test_a_fork_that_ends_takes_nothing_with_it() -> None:
    with FlowerHome() as home:
        child = home.start_process("child", "python", "-c", "import time; time.sleep(600)")
        if not (fork := os.fork()):
            home.close()
            os._exit(0)
        assert os.waitpid(fork, 0)[1] == 0
        assert child.poll() is None and home.folder.exists()
    assert child.poll() is not None and not home.folder.exists()


def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "STOP_TIMEOUT_S", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    )
    with FlowerHome() as home:
        child = home.start_process("deaf", "python", "-c", f"{deaf}; time.sleep(600)")
        home.wait_for("deaf", "1")
        assert watcher.end(home.folder) == 1
        assert child.wait(timeout=5) == (-signal.SIGKILL if os.name == "posix" else 15)


def test_make_stop_ends_what_a_crash_left_and_says_so(tmp_path: Path) -> None:
    stop = [sys.executable, "-P", str(watcher.PROGRAM)]
    here = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp_path))
    nothing = subprocess.run(stop, env=here, capture_output=True, check=True, text=True)
    assert nothing.stdout.startswith("Nothing to stop: no processes, and no folder ")

    left, gone, others = (tmp_path / f"{watcher.PREFIX}{n}" for n in ("left", "gone", "others"))
    other = tmp_path / "other-program" / others.name
    for folder in (left, other):
        folder.mkdir(parents=True)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    homes = (left, left, gone, other)
    started = [subprocess.Popen(sleep, env=here | {"FLWR_HOME": str(home)}) for home in homes]
    said = subprocess.run(stop, env=here, capture_output=True, check=True, text=True).stdout
    assert said.splitlines() == [
        f"{gone}: 1 processes ended, folder removed",
        f"{left}: 2 processes ended, folder removed",
    ]
    assert [process.poll() is None for process in started] == [False, False, False, True]
    assert not left.exists() and other.exists()
    started[-1].kill()
    started[-1].wait()
