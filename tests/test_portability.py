"""Nothing that only Linux has, in the package and the notebooks, but where it is said and guarded.

No Windows or macOS was at hand. So a type checker looks at the code with the standard library of
each, and a process runs a round with what Windows lacks taken away.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from refresh import code_cells

import fedlib
from fedlib.config import Config
from fedlib.data import Dataset
from test_notebooks import magicless, read

PACKAGE = Path(fedlib.__file__).parent
NOTEBOOKS = PACKAGE.parents[1] / "notebooks"
SYSTEMS = ("win32", "darwin")
COLAB_RUNS_LINUX = "colab.py"
"""That cell, in every notebook, does nothing elsewhere."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The package's modules, and each notebook's code as a module."""
    folder = tmp_path_factory.mktemp("notebooks")
    scripts = {path for path in NOTEBOOKS.glob("*.py") if path.name != COLAB_RUNS_LINUX}
    paths = [*sorted(PACKAGE.glob("*.py")), *sorted(scripts)]
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        code = "\n\n".join(magicless(cell) for cell in code_cells(read(notebook)))
        paths.append(folder / f"notebook_{notebook.stem.replace('-', '_')}.py")
        paths[-1].write_text(code, encoding="utf-8")
    return paths


# --- names that a system does not have


def missing(system: str, paths: list[Path]) -> list[str]:
    """What the standard library of a system lacks, as typeshed knows it."""
    options = (
        "--config-file=",
        "--follow-imports=skip",
        "--check-untyped-defs",
        f"--cache-dir={os.devnull}",
    )
    command = [sys.executable, "-m", "mypy", f"--platform={system}", *options, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return re.findall(r".*: Module .*has no attribute .*", done.stdout)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_name_of_the_standard_library_is_there(system: str, sources: list[Path]) -> None:
    assert missing(system, sources) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os\nos.fork()", ["fork"]),
        ("import os, signal\ndef stop(pid):\n    os.kill(pid, signal.SIGKILL)", ["SIGKILL"]),
        ("import fcntl\nfcntl.flock(0, fcntl.LOCK_EX)", ["flock", "LOCK_EX"]),
        ("import sys, os\nif sys.platform == 'linux':\n    os.fork()", []),
    ],
)
def test_a_name_that_windows_lacks_is_found(code: str, found: list[str], tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(code, encoding="utf-8")
    assert re.findall(r'attribute "(\w+)"', "\n".join(missing("win32", [file]))) == found


# --- what no type tells


POSIX_TEXT = {
    "a path of Linux": r"^/(tmp|dev|proc|sys|etc|bin|usr|var)(/|$)",
    "strftime without zeros": r"%-[dmHIMSjy]",
}


def habits(source: str) -> Iterator[str]:
    """What runs on Linux and surprises elsewhere: by line, in words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name, pattern in POSIX_TEXT.items():
                if re.search(pattern, node.value):
                    yield f"{node.lineno}: {name}: {node.value[:40]!r}"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if is_text_file(node) and "encoding" not in keywords:
                yield f"{node.lineno}: no encoding: {ast.unparse(node)[:60]}"
            if "shell" in keywords:
                yield f"{node.lineno}: which shell? {ast.unparse(node)[:60]}"


def is_text_file(call: ast.Call) -> bool:
    """Does the call read or write a file, or a process's output, as text?"""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = [argument for argument in call.args if isinstance(argument, ast.Constant)]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "read_text":
        return not given
    if name == "write_text":
        return len(call.args) < 2
    if name == "open" and not re.search(r"^(os|webbrowser)\.|build_opener", ast.unparse(call.func)):
        modes = [str(a.value) for a in given] + [ast.unparse(keywords.get("mode", call.func))]
        return not any(re.fullmatch("['\"]?[rwax+]*b[rwax+]*['\"]?", mode) for mode in modes)
    return "text" in keywords or "universal_newlines" in keywords


def test_nothing_relies_on_the_habits_of_linux(sources: list[Path]) -> None:
    found = [
        f"{path.name}:{habit}"
        for path in sources
        for habit in habits(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("Path('/tmp/x').unlink()", "1: a path of Linux: '/tmp/x'"),
        ("f'{now:%-d %B}'", "1: strftime without zeros: '%-d %B'"),
        ("open(name)", "1: no encoding: open(name)"),
        ("path.open('a')", "1: no encoding: path.open('a')"),
        ("path.read_text()", "1: no encoding: path.read_text()"),
        ("path.write_text(text)", "1: no encoding: path.write_text(text)"),
        ("run(command, text=True)", "1: no encoding: run(command, text=True)"),
        ("run(line, shell=True)", "1: which shell? run(line, shell=True)"),
        ("path.open('rb'); path.open(mode='wb'); os.open(path, 0)", None),
        ("path.read_text('utf-8'); path.write_text(text, encoding='utf-8')", None),
    ],
)
def test_such_a_habit_is_found(code: str, found: str | None) -> None:
    assert list(habits(code)) == ([found] if found else [])


# --- a round without what Windows lacks


OTHERS = """
import datasets, filelock, flwr.app, flwr.clientapp, flwr.serverapp, flwr_datasets, numpy, psutil
import cryptography.x509, matplotlib.pyplot, requests, torch, torch._dynamo
"""
"""What they have taken before it goes is theirs: other people's code knows where it runs."""

TAKE_AWAY = """
import asyncio, json, os, select, signal, socket, sys, time
for module in ("crypt", "fcntl", "grp", "pty", "pwd", "resource", "spwd", "syslog", "termios"):
    sys.modules[module] = None
for module, names in {
    os: "fork forkpty getuid geteuid getgid getpgid killpg nice sched_getaffinity setsid uname",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pause setitimer",
    socket: "AF_UNIX recv_fds send_fds socketpair",
    select: "epoll poll",
    time: "tzset",
}.items():
    for name in names.split():
        delattr(module, name)
precise = time.time
time.time = lambda: precise() // 0.015625 / 64  # a clock with steps
"""

ROUND = """
sys.platform, before = "win32", sys.platform
import fedlib.deployment, fedlib.notebook, fedlib.server_app, fedlib.warm
from fedlib import Config, LocalGrid, make_client_app, run
assert not fedlib.warm.AVAILABLE
sys.platform = before
config = Config.from_run_config(json.loads(sys.argv[1]))
run(LocalGrid(make_client_app(config), 4), config)
"""


def as_on_windows(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code where the standard library has gaps, and text is not UTF-8 unless one says so."""
    return subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, *arguments],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        check=False,
    )


def test_a_round_runs_without_what_windows_lacks(
    small_config: Config, small_dataset: Dataset
) -> None:
    # Some answers take longer than their message lives: by a clock with steps, too.
    config = dataclasses.replace(small_config, query_timeout=0.2, query_max_delay=0.4)
    done = as_on_windows(OTHERS + TAKE_AWAY + ROUND, json.dumps(config.to_run_config()))
    assert done.returncode == 0, done.stderr
    assert "Finished" in done.stdout
    [results] = Path(config.output_dir).rglob("results.json")
    rounds = json.loads(results.read_text(encoding="utf-8"))["rounds"]
    assert len(rounds) == 2
    assert sum(record["query"]["num_missing"] for record in rounds) > 0
    assert sum(record["query"]["num_errors"] for record in rounds) == 0
    assert all(record["train"]["num_received"] == 2 for record in rounds)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("os.fork()", "AttributeError: module 'os' has no attribute 'fork'"),
        ("import pwd", "ModuleNotFoundError: import of pwd halted"),
        ("open(sys.argv[1], 'w').write('é')", "UnicodeEncodeError"),
    ],
)
def test_there_it_is_really_gone(code: str, complaint: str, tmp_path: Path) -> None:
    done = as_on_windows(TAKE_AWAY + code, str(tmp_path / "file"))
    assert done.returncode == 1
    assert complaint in done.stderr


def test_the_module_for_linux_says_so_in_one_line(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.platform = 'darwin'\n"
        "runpy.run_module('fedlib.warm', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "fedlib.warm: expected Linux, got darwin; start the SuperNode without it"
    )
