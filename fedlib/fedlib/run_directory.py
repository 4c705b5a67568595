"""The run directory: everything a run leaves behind, each file written whole or not at all.

outputs/<date>/<time>/
    run_config.json     the run config, as ``--run-config`` spells it
    results.json        one record a round; every plot and every W&B log derives from it
    checkpoints/        the global model, each time that it was the best so far
    latest.pt           the last global model: what ``resume-from`` starts with
    .lock               while a process is at work here
"""

import itertools
import json
import math
import os
import platform
import secrets
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import torch
from filelock import FileLock, Timeout

from fedlib.config import Config, absolute
from fedlib.console import say
from fedlib.errors import RunDirectoryError, one_line
from fedlib.model import State, check_state, state_hash

SCHEMA_VERSION = 1
# Keys that do not decide what a round computes (the data set's own name is compared instead).
MAY_CHANGE = {"output-dir", "resume-from", "use-wandb", "server-device", "dataset"}
MAY_CHANGE |= {"query-timeout", "reply-timeout", "roll-call-timeout"}


@dataclass
class Stage:
    """What a stage came to: ``num_sent = num_received + num_errors + num_missing``."""

    num_sent: int = 0  # messages that the server meant to send
    num_received: int = 0  # replies that came in time and were accepted
    num_errors: int = 0  # replies that carried an error, or were refused
    num_missing: int = 0  # messages without any reply in time
    bytes_sent: int = 0  # of the contents
    bytes_received: int = 0  # of the contents, refused ones included
    seconds: float = 0.0  # from the first push to the last reply, or to the timeout
    problems: list[str] = field(default_factory=list)  # a line an error, and a reply missed


@dataclass
class Round:
    """One round in results.json; a value is null where there was nothing to measure."""

    server_round: int  # from 1
    learning_rate: float  # as sent to the nodes
    train_loss: float | None = None  # mean over all examples of all nodes (nats)
    centralized_accuracy: float | None = None  # of the new model on the test split, 0 to 1
    centralized_loss: float | None = None  # its mean cross-entropy there (nats)
    federated_evaluate_accuracy: float | None = None  # mean over the nodes, each counting once
    federated_evaluate_accuracy_std: float | None = None  # of the population of these nodes
    federated_evaluate_loss: float | None = None  # likewise (nats)
    federated_evaluate_loss_std: float | None = None  # likewise
    num_opted_in: int = 0  # nodes that answered QUERY with yes in time
    train: Stage = field(default_factory=Stage)
    query: Stage = field(default_factory=Stage)
    evaluate: Stage = field(default_factory=Stage)
    centralized_seconds: float = 0.0  # of the central evaluation, which overlaps the QUERY
    seconds: float = 0.0  # of the whole round
    model_sha256: str = ""  # state_hash of the new global model


@dataclass(frozen=True)
class Latest:
    """What latest.pt holds: the global model after the last finished round."""

    server_round: int
    model: State
    memory: State = field(default_factory=dict)  # of the server's step (see aggregation)


@dataclass
class RunDirectory:
    """A run's directory and what it holds.

    A file that cannot be written does not end the training: that is said, and tried again with the
    next file. ``close`` tries once more, and raises. Until then, no other process can open it.
    """

    path: Path  # absolute
    results: dict[str, Any]  # what results.json holds; save_round appends to its "rounds"
    latest: Latest | None = None  # where a stopped run goes on; None for a new one
    _lock: FileLock | None = None
    _unwritten: dict[str, Callable[[], None]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, config: Config, dataset: str, num_partitions: int, reference: State
    ) -> "RunDirectory":
        """Make a new directory ``<output-dir>/<date>/<time>``, or open the one to go on in.

        ``config.resume_from`` decides. ``dataset`` is the data set's name, ``reference`` a model
        state of the right names, shapes and dtypes.

        Raises:
            RunDirectoryError: It cannot be written; or of a stopped run, a file is missing or
                damaged, config, data set or nodes are others, or another process is at work in it.
                Its files are left as they are.
        """
        about = {"dataset": dataset, "num_partitions": num_partitions}
        about["config"] = config.to_run_config()
        resumed, output_dir = config.resume_from, absolute(config.output_dir)
        path = absolute(resumed) if resumed else _new_folder(output_dir)
        rest = {"versions": _versions(), "rounds": []}
        results = {"schema_version": SCHEMA_VERSION, **about, **rest}
        directory = cls(path, results, _lock=_acquire(path))
        try:
            if resumed:
                directory.results, directory.latest = _stopped_run(path, reference)
                directory._expect_same(about)
                directory.results["config"] = about["config"]
            for partial in path.rglob("*.partial-*"):  # left by a process that was killed
                with suppress(OSError):
                    partial.unlink()
            write_json(path / "run_config.json", about["config"])
            write_json(path / "results.json", directory.results)
        except BaseException:
            directory._release()
            raise
        return directory

    @property
    def best_accuracy(self) -> float:
        """Best central accuracy so far of a model that nodes had trained; -1 before the first."""
        known = [r["centralized_accuracy"] for r in self.trained_rounds]
        return max((accuracy for accuracy in known if accuracy is not None), default=-1.0)

    @property
    def trained_rounds(self) -> list[dict[str, Any]]:
        """The rounds in which the model changed: at least one node's training could be used."""
        return [r for r in self.results["rounds"] if r["train"]["num_received"]]

    def save_round(self, record: Round, model: State, memory: State | None = None) -> None:
        """Write a finished round, then its model: a crash between the two loses nothing."""
        self.results["rounds"].append(asdict(record))
        latest = Latest(record.server_round, dict(model), dict(memory or {}))

        def write() -> None:
            write_json(self.path / "results.json", self.results)
            write_atomically(self.path / "latest.pt", lambda f: torch.save(vars(latest), f))

        self._attempt("round", write)

    def save_checkpoint(self, server_round: int, accuracy: float, model: State) -> None:
        """Write the model of a round, named for its central accuracy."""
        name = f"round-{server_round:03d}-accuracy-{accuracy:.4f}.pt"
        file, state = self.path / "checkpoints" / name, dict(model)
        self._attempt("best", lambda: write_atomically(file, lambda f: torch.save(state, f)))

    def close(self) -> None:
        """Write what could not be written before, and let other processes in.

        Raises:
            RunDirectoryError: Some of it still cannot be.
        """
        with ExitStack() as every:  # calls all of them, also when one raises
            every.callback(self._release)
            for write in self._unwritten.values():
                every.callback(write)
        self._unwritten.clear()

    def _release(self) -> None:
        if self._lock and self._lock.is_locked:  # afterwards the file may be somebody else's
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write; where that fails, say so and remember it, in place of an older one of its kind."""
        self._unwritten[what] = write
        for name, pending in list(self._unwritten.items()):
            try:
                pending()
                del self._unwritten[name]
            except RunDirectoryError as error:
                say(f"⚠️ {error}")

    def _expect_same(self, about: dict[str, Any]) -> None:
        free = set(MAY_CHANGE)
        if about["config"]["learning-rate-schedule"] != "cosine":  # which alone looks at the length
            free.add("num-server-rounds")
        before, after = ({**of, **of["config"]} for of in (self.results, about))
        before = Config().to_run_config() | before  # a key younger than the run had its default
        names = {*about["config"]} - free | {"num_partitions"}
        pairs = {name: (before[name], after[name]) for name in sorted(names)}
        pairs["data set"] = self.results["dataset"], about["dataset"]
        changed = [f"{k}: it had {a!r}, now {b!r}" for k, (a, b) in pairs.items() if a != b]
        if changed:
            raise RunDirectoryError(
                f"resume-from {self.path}: expected the stopped run's config, got a change "
                f"({'; '.join(changed)}); set the old values, or start anew without resume-from"
            )


def load_results(run_directory: Path | str) -> dict[str, Any]:
    """Return what a run directory's results.json holds.

    Raises:
        OSError, ValueError: There is none, or it is no JSON of finite numbers.
    """
    text = (Path(run_directory) / "results.json").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text, parse_float=_number, parse_constant=_number)
    return results


def _number(text: str) -> float:
    """Read a number as JSON has them; Python's reader takes NaN and 1e999, too."""
    if (value := finite(float(text))) is None:
        raise ValueError(f"{text}, which is no number in JSON")
    return value


def finite(value: float) -> float | None:
    """Return the value, or None where it is NaN or infinite, which JSON does not know."""
    return value if math.isfinite(value) else None


def mean_and_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Return mean and population standard deviation, or (None, None) of no values."""
    numbers = sorted(values)  # sorted: the sum must not depend on who answered first
    if not numbers:
        return None, None
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)
    return mean, math.sqrt(variance)


def write_json(target: Path, content: Any) -> None:
    """Write a JSON file as ``write_atomically`` does."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: readers see the old file or the new one.

    The file's folder is made if need be; ``write`` writes to the path that it is given.

    Raises:
        RunDirectoryError: The file cannot be written; the old one, if any, is untouched.
    """
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise RunDirectoryError(
            f"{target}: expected a writable folder with free space, got: {one_line(error)}; "
            f"choose another one with output-dir"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _new_folder(output_dir: Path) -> Path:
    now = datetime.now()
    day = output_dir / f"{now:%Y-%m-%d}"
    try:
        day.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = day / (f"{now:%H-%M-%S}" + (f"-{number}" if number > 1 else ""))
            with suppress(FileExistsError):  # another run of the same second
                folder.mkdir()
                break
    except OSError as error:
        raise RunDirectoryError(
            f"output-dir {output_dir}: expected a folder that can be written, got: {error}"
        ) from error
    return folder


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("fedlib", "flwr", "flwr-datasets", "torch", "numpy"):
        with suppress(PackageNotFoundError):  # flwr run needs no installed fedlib
            versions[name] = version(name)
    return versions


def _acquire(path: Path) -> FileLock:
    """Become the only one who writes to a run directory, until the lock or the process ends."""
    lock = FileLock(path / ".lock", thread_local=False)
    try:
        if path.is_dir():  # else it would be made; what is missing is said by who looks for it
            lock.acquire(blocking=False)
    except Timeout as error:
        raise RunDirectoryError(
            f"resume-from {path}: expected a run that was stopped, got one at which another "
            f"process is at work; wait for its end, or start anew without resume-from"
        ) from error
    except (OSError, NotImplementedError):  # read-only, or a file system without locks
        pass
    return lock


def _check_types(kind: type, values: Any) -> None:
    """Check that values read from JSON are those of a Round or Stage."""
    for name, hint in get_type_hints(kind).items():
        if hint is Stage:
            _check_types(Stage, values[name])
        elif not isinstance(values[name], list if hint == list[str] else hint):
            raise ValueError(f"{values[name]!r} as {name}")


def _stopped_run(path: Path, reference: State) -> tuple[dict[str, Any], Latest]:
    """Read a run that was stopped; rounds after its last saved model are dropped."""
    try:
        results = load_results(path)
        if results["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {results['schema_version']}")
        latest = Latest(**torch.load(path / "latest.pt", weights_only=True, map_location="cpu"))
        check_state(latest.model, reference)
        rounds = results["rounds"][: latest.server_round]
        for record in rounds:
            _check_types(Round, record)
        if [record["server_round"] for record in rounds] != [*range(1, latest.server_round + 1)]:
            raise ValueError(f"a model of round {latest.server_round} and {len(rounds)} rounds")
        if rounds[-1]["model_sha256"] != state_hash(latest.model):
            raise ValueError(f"the model of another round than {latest.server_round}")
        _ = results["config"].items(), results["dataset"], results["num_partitions"]
        return {**results, "rounds": rounds}, latest
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise RunDirectoryError(
            f"resume-from {path}: expected results.json and latest.pt of a stopped run, got "
            f"{reason}; they are left as they are: restore them, or start anew without resume-from"
        ) from error
