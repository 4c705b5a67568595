"""The run directory: everything a run leaves behind, each file written whole or not at all.

    outputs/<date>/<time>/
        run_config.json     the run config, as ``--run-config`` spells it
        results.json        one record a round; every plot and every W&B log derives from it
        checkpoints/        the global model, each time that it was the best so far
        latest.pt           the last global model and its round: what ``resume-from`` starts with

results.json, schema version 1: ``schema_version``, ``dataset``, ``num_partitions``, ``config``,
``versions`` and ``rounds``, a list of ``Round`` records (see there).
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedlib.config import Config, absolute
from fedlib.errors import RunDirectoryError, one_line
from fedlib.model import State

SCHEMA_VERSION = 1


@dataclass
class Stage:
    """What a stage came to: ``num_sent = num_received + num_errors + num_missing``.

    Attributes:
        num_sent: Messages that the server meant to send.
        num_received: Replies that came in time and were accepted.
        num_errors: Replies that carried an error, or were refused.
        num_missing: Messages without any reply in time.
        bytes_sent: Size of the contents sent.
        bytes_received: Size of the contents received, refused ones included.
        seconds: From the first push to the last reply, or to the timeout.
        problems: One line for each error, and for each reply missed where all should come.
    """

    num_sent: int = 0
    num_received: int = 0
    num_errors: int = 0
    num_missing: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Round:
    """One round in results.json; a value is null where there was nothing to measure.

    Attributes:
        server_round: The round, from 1.
        learning_rate: The rate sent to the nodes.
        train_loss: Mean training loss over all examples of all nodes (nats).
        centralized_accuracy: Of the new global model on the test split, 0 to 1.
        centralized_loss: Its mean cross-entropy there (nats).
        federated_evaluate_accuracy: Mean over the nodes that evaluated, each counting once.
        federated_evaluate_accuracy_std: Standard deviation (of the population) over the nodes.
        federated_evaluate_loss: Likewise the mean loss (nats).
        federated_evaluate_loss_std: Likewise its standard deviation.
        num_opted_in: Nodes that answered QUERY with yes in time.
        train: Counts, bytes and seconds of the TRAIN stage (see ``Stage``).
        query: Likewise of the QUERY stage.
        evaluate: Likewise of the EVALUATE stage.
        centralized_seconds: Seconds of the central evaluation, which overlaps ``query``.
        seconds: Seconds of the whole round.
        model_sha256: ``state_hash`` of the new global model.
    """

    server_round: int
    learning_rate: float
    train_loss: float | None = None
    centralized_accuracy: float | None = None
    centralized_loss: float | None = None
    federated_evaluate_accuracy: float | None = None
    federated_evaluate_accuracy_std: float | None = None
    federated_evaluate_loss: float | None = None
    federated_evaluate_loss_std: float | None = None
    num_opted_in: int = 0
    train: Stage = field(default_factory=Stage)
    query: Stage = field(default_factory=Stage)
    evaluate: Stage = field(default_factory=Stage)
    centralized_seconds: float = 0.0
    seconds: float = 0.0
    model_sha256: str = ""


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


@dataclass
class RunDirectory:
    """A run's directory and what it holds.

    Attributes:
        path: The directory, absolute.
        results: What results.json holds; ``save_round`` appends to ``results["rounds"]``.
    """

    path: Path
    results: dict[str, Any]

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make a new directory ``<output-dir>/<date>/<time>``.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        now = datetime.now()
        parent = absolute(config.output_dir) / f"{now:%Y-%m-%d}"
        directory = cls(_new_folder(parent, f"{now:%H-%M-%S}"), {})
        directory.set_config(config)
        return directory

    def set_config(self, config: Config) -> None:
        """Write run_config.json, and put the same into results.json when it is written next.

        Raises:
            RunDirectoryError: The directory cannot be written (any more).
        """
        self.results["config"] = config.to_run_config()
        self._write_json("run_config.json", self.results["config"])

    def describe(self, dataset: str, num_partitions: int) -> None:
        """Write the first results.json: what the run is about, and no round yet.

        Raises:
            RunDirectoryError: The directory cannot be written (any more).
        """
        self.results = {
            "schema_version": SCHEMA_VERSION,
            "dataset": dataset,
            "num_partitions": num_partitions,
            "config": self.results["config"],
            "versions": _versions(),
            "rounds": [],
        }
        self._write_json("results.json", self.results)

    @property
    def best_accuracy(self) -> float:
        """Best central accuracy so far; -1 before the first."""
        known = [r["centralized_accuracy"] for r in self.results["rounds"]]
        return max((accuracy for accuracy in known if accuracy is not None), default=-1.0)

    def save_round(self, record: Round, state: State) -> None:
        """Write a finished round, then its model: a crash between the two loses nothing.

        Raises:
            RunDirectoryError: The directory cannot be written (any more). What it held before
                is still there, and the next call writes this round too.
        """
        self.results["rounds"].append(asdict(record))
        self._write_json("results.json", self.results)
        latest = {"server_round": record.server_round, "model": dict(state)}
        write_atomically(self.path / "latest.pt", lambda path: torch.save(latest, path))

    def save_checkpoint(self, server_round: int, accuracy: float, state: State) -> None:
        """Write the model of a round, named for its central accuracy.

        Raises:
            RunDirectoryError: The directory cannot be written (any more).
        """
        name = f"round-{server_round:03d}-accuracy-{accuracy:.4f}.pt"
        target = self.path / "checkpoints" / name
        write_atomically(target, lambda path: torch.save(dict(state), path))

    def _write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: readers see the old file or the new one.

    Args:
        target: The file; its folder is made if need be.
        write: Writes to the path that it is given.

    Raises:
        RunDirectoryError: The file cannot be written; the old one, if any, is untouched.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = one_line(error)
        raise RunDirectoryError(
            f"{target}: expected a writable folder with free space, got: {reason}; "
            f"choose another one with output-dir"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _new_folder(parent: Path, name: str) -> Path:
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = parent / (name + suffix)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not parent.is_dir():
                break
        except OSError as error:
            raise RunDirectoryError(
                f"output-dir {parent}: expected a folder that can be written, got: {error}"
            ) from error
    raise RunDirectoryError(f"output-dir {parent}: expected a folder with room for a new run")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("fedlib", "flwr", "flwr-datasets", "torch", "numpy"):
        with suppress(PackageNotFoundError):  # flwr run needs no installed fedlib
            versions[name] = version(name)
    return versions
