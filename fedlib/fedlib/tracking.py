"""Weights & Biases: four metrics and the learning rate, once a round; never in the way.

It never asks a question, never stops the training, and is not imported with ``use-wandb=false``.
"""

import hashlib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedlib.console import say
from fedlib.errors import one_line
from fedlib.results import Round, RunDirectory

PROJECT = "fedlib"
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0
METRICS = (
    "centralized_accuracy",
    "centralized_loss",
    "federated_evaluate_accuracy",
    "federated_evaluate_loss",
    "learning_rate",
)


class Tracker(Protocol):
    """Where a round's metrics go besides results.json."""

    def log(self, record: Round) -> None:
        """Take one round."""


class NoTracker:
    """Takes every round and does nothing."""

    def log(self, record: Round) -> None:
        """Do nothing."""


class WandbTracker:
    """Sends every round to W&B; the first failure is reported in one line, then it is silent."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, record: Round) -> None:
        """Send one round; a value that was not measured is left out."""
        values = {name: getattr(record, name) for name in METRICS}
        known = {name: value for name, value in values.items() if value is not None}
        self._call(lambda: self._run.log(known, step=record.server_round))

    def finish(self, exit_code: int) -> None:
        """Close the run: 0 for success, 1 if training raised."""
        self._call(lambda: self._run.finish(exit_code=exit_code))

    def _call(self, function: Any) -> None:
        if self._run is None:
            return
        try:
            function()
        except Exception as error:
            self._run = None
            say(f"⚠️ W&B stopped ({_line(error)}); the run goes on, results.json has everything.")


@contextmanager
def tracking(use_wandb: bool, directory: RunDirectory) -> Iterator[Tracker]:
    """Open a tracker for the run, and close it also when the training raises.

    Args:
        use_wandb: Whether to track at all.
        directory: The run's directory: W&B's own files go there, its config and data set's name
            go to W&B.
    """
    tracker = _start(directory) if use_wandb else None
    if tracker is None:
        yield NoTracker()
        return
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.finish(exit_code)


def _start(directory: RunDirectory) -> WandbTracker | None:
    try:
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        try:
            run = _init(directory, mode)
        except Exception as error:
            if mode == "offline" or _wrong_setting(error):  # going offline cures neither
                raise
            say(f"⚠️ W&B is out of reach ({_line(error)}); going offline.")
            run, mode = _init(directory, "offline", id_suffix="-offline"), "offline"
        if mode == "offline":
            folder = shlex.quote(str(Path(run.dir).parent))
            say(f"W&B is offline; to send the run later: wandb login, wandb sync {folder}")
        return WandbTracker(run)
    except Exception as error:
        say(f"⚠️ W&B did not start ({_line(error)}); the run goes on without it.")
        return None


def _init(directory: RunDirectory, mode: str, id_suffix: str = "") -> Any:
    import wandb

    # From the directory's path, so that a resumed run goes on as the same one; another one after
    # a failed start, because W&B takes the first for in use.
    run_id = hashlib.sha256(str(directory.path).encode()).hexdigest()[:12] + id_suffix

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,  # the default waits for ever for a lost network
    )
    return wandb.init(
        project=PROJECT,
        id=run_id,
        name=f"{directory.path.parent.name} {directory.path.name}",
        dir=directory.path,
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        config={**directory.results["config"], "dataset": directory.results["dataset"]},
        settings=settings,
    )


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import requests  # reads ~/.netrc, where "wandb login" leaves the key

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return requests.utils.get_netrc_auth(host) is not None


def _wrong_setting(error: BaseException) -> str | None:
    """Say which setting W&B refuses, usually an environment variable, in words of our own."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    problem = error.errors()[0]
    name = "_".join(["WANDB", *map(str, problem["loc"])]).upper()
    where = "environment variable" if name in os.environ else "setting"
    expected = problem["msg"].replace("Input should be", "expected")
    return f"{where} {name}: {expected}, got {problem['input']!r}"


def _line(error: BaseException) -> str:
    return _wrong_setting(error) or one_line(f"{type(error).__name__}: {error}")[:200]
