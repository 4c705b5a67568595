"""Going on with a stopped run: the same rounds, to the bit, as if it had never stopped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlib.config import Config, absolute
from fedlib.errors import RunDirectoryError, one_line
from fedlib.model import State, check_state, state_hash
from fedlib.results import SCHEMA_VERSION, Round, RunDirectory

MAY_CHANGE = frozenset(
    {
        "output-dir",
        "resume-from",
        "use-wandb",
        "server-device",
        "dataset",
        "query-timeout",
        "reply-timeout",
    }
)
"""Keys that do not decide what a round computes (the data set's own name is compared instead)."""


@dataclass(frozen=True)
class Resumed:
    """A stopped run: its directory, the global model, and the round that made it."""

    directory: RunDirectory
    model: dict[str, Tensor]
    server_round: int


def resume(run_directory: str, reference: State) -> Resumed:
    """Open a stopped run's directory to go on in it; rounds after its last model are dropped.

    Args:
        run_directory: ``resume-from``.
        reference: A model state of the right names, shapes and dtypes.

    Raises:
        RunDirectoryError: A file is missing or damaged; it is left as it is.
    """
    path = absolute(run_directory)
    results = _read_results(path / "results.json")
    model, server_round = _read_latest(path / "latest.pt", reference)
    rounds = results["rounds"][:server_round]
    if len(rounds) < server_round or rounds[-1]["model_sha256"] != state_hash(model):
        raise RunDirectoryError(
            f"{path}: expected latest.pt to hold the model of round {server_round} of "
            f"results.json, got another one; restore both files, or start anew without resume-from"
        )
    return Resumed(RunDirectory(path, {**results, "rounds": rounds}), model, server_round)


def expect_same_run(
    directory: RunDirectory, config: Config, dataset: str, num_partitions: int
) -> None:
    """Check that a stopped run may go on with a config, and write the config down.

    Args:
        directory: The stopped run's.
        config: The config of the run that goes on.
        dataset: Its data set's name.
        num_partitions: How many partitions its nodes hold.

    Raises:
        RunDirectoryError: The stopped run had another config, data set or number of nodes.
    """
    results, now = directory.results, config.to_run_config()
    free = set(MAY_CHANGE)
    if config.learning_rate_schedule != "cosine":  # only the cosine looks at the run's length
        free.add("num-server-rounds")
    pairs = {key: (results["config"].get(key), now[key]) for key in now if key not in free}
    pairs["data set"] = (results["dataset"], dataset)
    pairs["nodes"] = (results["num_partitions"], num_partitions)
    changed = [
        f"{key}: it had {old!r}, now {new!r}" for key, (old, new) in pairs.items() if old != new
    ]
    if changed:
        raise RunDirectoryError(
            f"resume-from {directory.path}: expected the stopped run's config, "
            f"got a change ({'; '.join(changed)}); set the old values, "
            f"or start anew without resume-from"
        )
    directory.set_config(config)


def _read_results(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {results['schema_version']}")
        numbers = [Round(**record).server_round for record in results["rounds"]]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"rounds {numbers}")
        _ = results["config"].items(), results["dataset"], results["num_partitions"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{file}: expected a results file of schema version {SCHEMA_VERSION}, "
            f"got {type(error).__name__}: {error}; it is left as it is: restore it, "
            f"or start anew without resume-from"
        ) from error
    return dict(results)


def _read_latest(file: Path, reference: State) -> tuple[dict[str, Tensor], int]:
    try:
        latest = torch.load(file, weights_only=True, map_location="cpu")
        check_state(latest["model"], reference)
        server_round = latest["server_round"]
        if type(server_round) is not int or server_round < 1:
            raise ValueError(f"round {server_round!r}")
        return latest["model"], server_round
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = one_line(error)[:200]
        raise RunDirectoryError(
            f"{file}: expected the model of the last finished round, "
            f"got {type(error).__name__}: {reason}; start anew without resume-from"
        ) from error
