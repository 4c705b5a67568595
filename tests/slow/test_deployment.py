"""Real processes, real TLS: the same bits, what is refused, who may die, and nothing left."""

import dataclasses
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedlib import warm
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.credentials import make_credentials
from fedlib.deployment import APP, Deployment
from fedlib.errors import FedlibError
from fedlib.local_grid import LocalGrid
from fedlib.processes import FlowerHome, free_port
from fedlib.server_app import run
from test_engines import read_rounds

NUM_NODES = 3


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Three nodes behind TLS, for all tests of this file that leave them alive."""
    with Deployment(NUM_NODES) as deployment:
        yield deployment


@pytest.fixture
def config(small_config: Config) -> Config:
    """Two rounds in which every node trains."""
    return dataclasses.replace(small_config, fraction_clients_train=1.0, query_timeout=60.0)


def hashes(config: Config) -> list[str]:
    return [record["model_sha256"] for record in read_rounds(config)]


def expected_hashes(config: Config, tmp_path: Path) -> list[str]:
    local = dataclasses.replace(config, output_dir=str(tmp_path / "local"))
    run(LocalGrid(make_client_app(local), NUM_NODES), local)
    return hashes(local)


def test_over_tls_it_gives_the_same_bits_as_a_local_grid(
    deployment: Deployment, config: Config, tmp_path: Path
) -> None:
    """And those of run_simulation and flwr run: test_engines compares them with it."""
    log = deployment.wait(deployment.submit(config))
    assert "🏁 Finished" in log and "⚠️" not in log
    rounds = read_rounds(config)
    assert [record["train"]["num_received"] for record in rounds] == [3, 3]
    assert [record["query"]["num_received"] for record in rounds] == [3, 3]
    assert hashes(config) == expected_hashes(config, tmp_path)

    trace = deployment.trace()
    assert {(m["message_type"], m["partition_id"]) for m in trace} >= {
        (name, n) for name in ("query.identify", "train", "query") for n in range(NUM_NODES)
    }
    assert all(m["sent"] < m["began"] <= m["ended"] for m in trace)
    if warm.AVAILABLE:  # no import of Flower or PyTorch in a fork
        assert max(m["startup_cpu_s"] for m in trace) < 0.8


def test_a_run_that_fails_raises_what_the_log_said(deployment: Deployment, config: Config) -> None:
    wrong = dataclasses.replace(config, dataset="/no/such/folder")
    with pytest.raises(FedlibError, match=r"run \d+: finished:failed: .*no such folder"):
        deployment.wait(deployment.submit(wrong))


def refused(deployment: Deployment, name: str, *trust: str) -> str:
    """Start a SuperNode that must not get in, and return its log once it has given up."""
    address = f"127.0.0.1:{deployment.port}"
    command = ["flower-supernode", "--superlink", address, "--port", str(free_port())]
    command += ["--node-config", "partition-id=0 num-partitions=3", "--max-retries", "0"]
    process = deployment.start_process(name, *command, *trust)
    process.wait(timeout=90)
    log = deployment.log(name)
    assert "Exit Code: 305" in log and "SuperNode ID" not in log
    return log


def test_a_node_whose_key_is_not_registered_is_refused(
    deployment: Deployment, tmp_path: Path
) -> None:
    assert deployment.credentials
    stranger = make_credentials(tmp_path / "stranger", 1)
    trust = ("--root-certificates", str(deployment.credentials.ca))
    key = ("--auth-supernode-private-key", str(stranger.node_keys[0]))
    log = refused(deployment, "stranger", *trust, *key)
    assert "[code: 2004] Failed to activate SuperNode" in log
    assert "Attempted to register SuperNode with public key" in deployment.log("superlink")


def test_a_node_that_does_not_trust_the_authority_refuses_the_superlink(
    deployment: Deployment, tmp_path: Path
) -> None:
    assert deployment.credentials
    other = make_credentials(tmp_path / "other", 1)
    key = ("--auth-supernode-private-key", str(deployment.credentials.node_keys[0]))
    log = refused(deployment, "mistrustful", "--root-certificates", str(other.ca), *key)
    assert "certificate verify failed" in log


def test_plain_http_against_the_tls_port_is_refused(deployment: Deployment) -> None:
    log = refused(deployment, "plain", "--insecure")
    assert re.search(r"disconnected|reset by peer", log, re.IGNORECASE), log
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"http://127.0.0.1:{deployment.port}/health", timeout=10)


def kill_on(deployment: Deployment, partition_id: int, message_type: str) -> None:
    """Kill a SuperNode at the moment when it has taken up a message of this type."""
    seen = deployment.log(f"supernode-{partition_id}").count("Receiving: ")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = deployment.log(f"supernode-{partition_id}").split("Receiving: ")[1 + seen :]
        if any(line.startswith(f"{message_type} message") for line in lines):
            deployment.supernodes[partition_id].kill()
            deployment.supernodes[partition_id].wait(timeout=10)
            return
        time.sleep(0.02)
    raise AssertionError(f"no {message_type} message came")


def test_supernodes_killed_in_train_and_in_query_are_missed_by_name_and_come_back(
    deployment: Deployment, config: Config
) -> None:
    """A node that is busy for some seconds (query_max_delay) can be killed while it thinks."""
    config = dataclasses.replace(
        config, num_server_rounds=4, reply_timeout=20.0, query_timeout=20.0, query_max_delay=4.0
    )
    began, run_id = time.time(), deployment.submit(config)
    kill_on(deployment, 1, "train")
    deployment.replace_supernode(1)
    kill_on(deployment, 2, "query")
    deployment.replace_supernode(2)
    log = deployment.wait(run_id)

    rounds = read_rounds(config)
    first = rounds[0]
    assert first["train"]["num_received"] == 2
    [problem] = first["train"]["problems"]  # the SuperLink knows that it was unregistered
    assert re.search(r"node \d+ \(partition 1\): (Error: Node Unavailable|no reply)", problem)
    assert problem[:80] in log
    queries = [record["query"] for record in rounds]
    assert sum(q["num_errors"] + q["num_missing"] for q in queries) >= 1, queries
    answers = [m for m in deployment.trace() if m["sent"] > began and m["message_type"] == "query"]
    assert sum(m["partition_id"] == 2 for m in answers) < 4  # it was killed before it could
    assert sum(q["num_received"] for q in queries) <= len(answers)
    last = rounds[-1]
    assert last["train"]["num_received"] == NUM_NODES and last["train"]["problems"] == []
    assert len(set(hashes(config))) == 4


def test_a_superlink_that_is_killed_comes_back_with_its_runs_and_its_nodes(
    deployment: Deployment, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deployment.flwr("list", "deployment", "--format", "json")
    assert before.count('"run-id"') >= 1
    assert deployment.superlink is not None
    deployment.superlink.kill()
    deployment.superlink.wait(timeout=10)
    deployment.start_superlink()
    assert deployment.flwr("list", "deployment", "--format", "json") == before

    # Meanwhile somebody changed the app: the nodes run what was sent, warm or not.
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    app = Path(shutil.copytree(APP, tmp_path / "app", ignore=ignore))
    file = app / "fedlib" / "client_app.py"
    text = file.read_text(encoding="utf-8")
    changed = text.replace("OPT_IN_PROBABILITY = 0.5", "OPT_IN_PROBABILITY = 0.0")
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    monkeypatch.setattr("fedlib.deployment.APP", app)
    config = dataclasses.replace(config, num_server_rounds=1)
    deployment.wait(deployment.submit(config))
    assert hashes(config) == expected_hashes(config, tmp_path)
    assert [record["num_opted_in"] for record in read_rounds(config)] == [0]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, which no process may know afterwards and which is empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def left(folder: Path) -> list[str]:
    """What is left: files, processes that know the folder, and ports on which they listen."""
    found = [str(path) for path in folder.rglob("*")]
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.pid != os.getpid():
                found += [str(process), *map(str, process.net_connections("tcp"))]
        except psutil.Error:
            continue
    return found


def test_ten_federations_in_a_row_leave_nothing(counted: Path) -> None:
    before, ports = children(), []
    for number in range(10):
        keep_warm = warm.AVAILABLE and number % 5 == 0
        with Deployment(1, tls=bool(number % 2), keep_warm=keep_warm) as deployment:
            assert len(deployment.processes()) >= 4  # SuperLink, SuperNode, a SuperExec each
            assert any("LISTEN" in line for line in left(counted))
            ports.append(deployment.port)
        assert left(counted) == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", deployment.port))
    assert children() == before and len(set(ports)) == 10


def children() -> set[int]:
    """Children of this process that are there, or have ended without being waited for."""
    return {child.pid for child in psutil.Process().children()}


def test_an_exception_in_the_body_or_at_the_start_leaves_nothing(counted: Path) -> None:
    with pytest.raises(RuntimeError, match="the body"), Deployment(2):
        raise RuntimeError("the body")
    assert left(counted) == []

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broken = Deployment(1)
        broken.port = taken.getsockname()[1]
        with pytest.raises(
            FedlibError, match=r"SuperLink: did not start: .*address already in use"
        ):
            broken.start()
    assert left(counted) == []
    broken.close()  # once more does no harm


BODY = """
import signal, time
from fedlib.deployment import Deployment

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
with Deployment(1) as deployment:
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("when", ["while it starts", "in the body"])
def test_an_interrupt_leaves_nothing(counted: Path, when: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", BODY], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    if when == "in the body":
        assert process.stdout.readline() == "ready\n"
    else:
        deadline = time.monotonic() + 60
        while not any("flower-superl" in line for line in left(counted)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    assert left(counted) == []


def test_what_flwr_says_when_it_fails_is_one_line() -> None:
    with FlowerHome() as home:
        assert home.flwr("--version").startswith("Flower version: ")
        with pytest.raises(FedlibError, match=r"flwr run failed: .*no-such-app"):
            home.flwr("run", "no-such-app")
        with pytest.raises(FedlibError, match=r"flwr --version: expected an end within 0.05 s"):
            home.flwr("--version", timeout_s=0.05)
        assert home.processes() == []


@pytest.mark.skipif(not warm.AVAILABLE, reason="warm nodes are for Linux")
def test_a_warm_process_forks_for_the_command_and_without_it_the_command_runs_cold() -> None:
    with FlowerHome() as home:
        folder = home.folder / "warm"
        process = home.start_process("warm", "python", "-m", "fedlib.warm", str(folder))
        home.wait_for("warm", warm.READY)

        def ask(*arguments: str) -> tuple[str, float]:
            """Run the command; return what came on its own standard output, and the seconds."""
            before, read = time.monotonic(), home.folder / f"output-{len(arguments)}"
            with read.open("wb") as output:
                command = [folder / warm.COMMAND, *arguments]
                subprocess.run(command, stdout=output, stderr=output, check=False)
            while not read.read_bytes() and time.monotonic() < before + 30:
                time.sleep(0.01)  # the command ends when the fork has begun
            time.sleep(0.1)
            return read.read_text(), time.monotonic() - before

        forked, seconds = ask("--help")
        assert "usage: " in forked and "--runtime-api-address" in forked
        wrong, _ = ask("--no-such-flag")
        assert "unrecognized arguments" in wrong or "required" in wrong
        assert process.is_running() and seconds < 10
        process.kill()
        process.wait(timeout=10)
        cold, _ = ask("--help")
        assert cold == forked
