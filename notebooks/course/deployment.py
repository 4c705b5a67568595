"""A federation of real processes on this machine: one SuperLink, a SuperNode for each partition.

    with Deployment(num_nodes=3) as deployment:
        run_id = deployment.submit(Config(query_timeout=30.0))
        print(deployment.wait(run_id))

With TLS and authenticated nodes; all files lie in a temporary folder and go with the block.
"""

import json
import os
import ssl
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

import psutil

import fedlib
from course import warm
from course.processes import START_TIMEOUT_S, FlowerHome, free_port, last_words
from course.watcher import POLL_INTERVAL_S
from fedlib.client_app import TRACE
from fedlib.config import Config, absolute
from fedlib.credentials import make_credentials, write_node_key
from fedlib.errors import FedlibError

APP = Path(fedlib.__file__).resolve().parents[1]
"""The app's folder, which ``flwr run`` packs and sends: that of the installed fedlib."""
CONNECTION = "deployment"
"""What Flower's configuration calls this SuperLink."""


class Deployment(FlowerHome):
    """One SuperLink and its SuperNodes, ready when the block begins (or ``start()`` returns).

    Args:
        num_nodes: How many partitions, each held by a SuperNode of its own.
        num_started: How many of the SuperNodes are started, the first ones; None: all.
        tls: With TLS and authenticated nodes; without, all is plain HTTP and everybody may join.
        keep_warm: Answer messages from forks of a warm process (``course.warm``).
        show: Gets a line before each step of ``start``, such as ``print``.
        environment: Environment variables for the processes, besides this process's own.

    Attributes:
        port: Where the SuperLink listens.
        credentials: The certificates and keys, or None.
        superlink: Its process.
        supernodes: The SuperNodes' processes, by partition.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        num_started: int | None = None,
        tls: bool = True,
        keep_warm: bool = warm.AVAILABLE,
        show: Callable[[str], object] = lambda line: None,
        **environment: str,
    ) -> None:
        super().__init__(**environment)
        self.num_nodes, self.port, self.keep_warm = num_nodes, free_port(), keep_warm
        self.num_started = num_nodes if num_started is None else num_started
        self.show = show
        self.environment.setdefault(TRACE, str(self.folder / "trace.jsonl"))
        made = make_credentials(self.folder / "credentials", num_nodes) if tls else None
        self.credentials = made
        trust = f'root-certificates = "{made.ca.as_posix()}"' if made else "insecure = true"
        (self.folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\n{trust}\n',
            encoding="utf-8",
        )
        self.superlink: psutil.Popen | None = None
        self.supernodes: dict[int, psutil.Popen] = {}
        self._keys = dict(enumerate(made.node_keys)) if made else {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Start everything and wait until it is ready; on failure, leave nothing.

        Raises:
            FedlibError: A process did not start; the text has its last words.
        """
        try:
            if self.keep_warm:
                folder = self.folder / "warm"
                self.start_process("warm", "python", "-P", str(warm.PROGRAM), str(folder))
                self.environment["PATH"] = f"{folder}{os.pathsep}{self.environment['PATH']}"
            self.show("Starting the SuperLink ...")
            self.start_superlink()
            for partition_id in range(self.num_started):
                self.show(f"Registering and starting SuperNode {partition_id} ...")
                self.register(partition_id)
                self.start_supernode(partition_id)
            self.show("Waiting until the SuperLink has let them in ...")
            for partition_id in range(self.num_started):
                self.wait_for_supernode(partition_id)
            if self.keep_warm:
                self.show("Waiting for the warm process ...")
                self.wait_for("warm", warm.READY)
        except BaseException:
            self.close()
            raise

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers; its database outlives a restart."""
        command = ["flower-superlink", "--port", str(self.port)]
        command += ["--database", str(self.folder / "state.db")]
        if made := self.credentials:
            command += ["--ssl-ca-certfile", str(made.ca), "--ssl-certfile", str(made.certificate)]
            command += ["--ssl-keyfile", str(made.key), "--enable-supernode-auth"]
        else:
            command.append("--insecure")
        self.superlink = self.start_process("superlink", *command)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.superlink.poll() is not None or time.monotonic() > deadline:
                raise FedlibError(f"SuperLink: did not start: {last_words(self.log('superlink'))}")
            time.sleep(POLL_INTERVAL_S)

    def register(self, partition_id: int) -> None:
        """Make a node's public key known to the SuperLink (without TLS, everybody may join)."""
        if self.credentials:
            self.flwr("supernode", "register", f"{self._keys[partition_id]}.pub", CONNECTION)

    def start_supernode(self, partition_id: int) -> psutil.Popen:
        """Start the SuperNode that holds a partition, without waiting for it."""
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port())]
        shares = f"partition-id={partition_id} num-partitions={self.num_nodes}"
        command += ["--node-config", shares]
        if made := self.credentials:
            command += ["--root-certificates", str(made.ca)]
            command += ["--auth-supernode-private-key", str(self._keys[partition_id])]
        else:
            command.append("--insecure")
        self.log_file(f"supernode-{partition_id}").unlink(missing_ok=True)
        process = self.start_process(f"supernode-{partition_id}", *command)
        self.supernodes[partition_id] = process
        return process

    def wait_for_supernode(self, partition_id: int) -> int:
        """Wait until the SuperLink has let a SuperNode in, and return its node id."""
        line = self.wait_for(f"supernode-{partition_id}", "SuperNode ID:")
        return int(line.rpartition(":")[2])

    def replace_supernode(self, partition_id: int) -> int:
        """Put a new SuperNode, with a new key, in the place of one that died.

        For up to a minute Flower takes a node that was killed for one that is online, lets no
        other in under its key, and no server know. Unregistering it makes both end at once.
        """
        if self.credentials:
            dead = self.wait_for_supernode(partition_id)
            self.flwr("supernode", "unregister", str(dead), CONNECTION)
            key = self._keys[partition_id]
            self._keys[partition_id] = key.with_name(f"{key.name}-new")
            write_node_key(self._keys[partition_id])
            self.register(partition_id)
        self.start_supernode(partition_id)
        return self.wait_for_supernode(partition_id)

    def submit(self, config: Config) -> str:
        """Hand in a run of fedlib's app and return its id; the run goes on by itself."""
        if not (APP / "pyproject.toml").is_file():
            raise FedlibError(
                f"submit: expected the app's pyproject.toml in {APP}, found none; install fedlib "
                f"from its folder: pip install -e fedlib"
            )
        config = replace(config, output_dir=str(absolute(config.output_dir)))
        values = config.to_run_config().items()
        given = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values)
        arguments = ("run", str(APP), CONNECTION, "--run-config", given, "--format", "json")
        return str(json.loads(self.flwr(*arguments))["run-id"])

    def status(self, run_id: str) -> str:
        """Return how a run stands, such as ``finished:completed``."""
        listed = json.loads(self.flwr("list", CONNECTION, "--run-id", run_id, "--format", "json"))
        return str(listed["runs"][0]["status"])

    def wait(self, run_id: str, show: Callable[[str], object] | None = None) -> str:
        """Wait until a run has ended and return its log (``show`` gets each line as it comes).

        Raises:
            FedlibError: It ended otherwise than completed.
        """
        log = self.flwr("log", run_id, CONNECTION, "--stream", show=show)
        if not (status := self.status(run_id)).endswith("completed"):
            raise FedlibError(f"run {run_id}: {status}: {last_words(log)}")
        return log

    def trace(self) -> list[dict[str, Any]]:
        """Return when each message was sent, and its handler began and ended, as nodes noted."""
        file = Path(self.environment[TRACE])
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def _answers(self) -> bool:
        trust = ssl.create_default_context(cafile=self.credentials.ca if self.credentials else None)
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        scheme = "https" if self.credentials else "http"
        with suppress(OSError, HTTPException):
            url = f"{scheme}://127.0.0.1:{self.port}/health"
            with urllib.request.build_opener(*handlers).open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        return False


def three_nodes(
    folder: Path, ca: Path, superlink: str, port: int, shares: str
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return four commands of notebook 12, and make the files that they name in a new folder.

    Returns:
        What registers a key; what starts the node with this key; what starts one whose key nobody
        registered; and one with the registered key, that trusts another authority.
    """
    mine, stranger = folder / "mine", folder / "stranger"
    for key in (mine, stranger):
        write_node_key(key)
    other = make_credentials(folder / "other", num_nodes=0).ca

    def start(key: Path, trusted: Path) -> list[str]:
        return [
            *("flower-supernode", "--superlink", superlink, "--port", str(port)),
            *("--root-certificates", str(trusted), "--auth-supernode-private-key", str(key)),
            *("--node-config", shares),
        ]

    register = ["flwr", "supernode", "register", f"{mine}.pub", CONNECTION]
    return register, start(mine, ca), start(stranger, ca), start(mine, other)
