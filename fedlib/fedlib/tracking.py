"""Weights & Biases: four metrics and the learning rate, once a round; never in the way.

It never asks a question, never stops the training, and is not imported with ``use-wandb=false``:
therefore ``import wandb``, which takes a second, stands in a function.
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from fedlib.console import say
from fedlib.errors import one_line
from fedlib.run_directory import Round, RunDirectory

PROJECT = "fedlib"
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0  # wandb's own default waits for ever for a lost network
METRICS = ["centralized_accuracy", "centralized_loss", "learning_rate"]
METRICS += ["federated_evaluate_accuracy", "federated_evaluate_loss"]


class Tracker:
    """Sends every round to W&B's run, if there is one; silent after the first failure's line."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    def log(self, record: Round) -> None:
        """Send one round; a value that was not measured is left out."""
        values = {name: getattr(record, name) for name in METRICS}
        known = {name: value for name, value in values.items() if value is not None}
        self._call(lambda: self._run.log(known, step=record.server_round))

    def finish(self, exit_code: int) -> None:
        """Close the run: 0 for success, 1 if training raised."""
        self._call(lambda: self._run.finish(exit_code=exit_code))

    def _call(self, function: Callable[[], object]) -> None:
        try:
            if self._run is not None:
                function()
        except Exception as error:
            self._run = None
            say(f"⚠️ W&B stopped ({_line(error)}); the run goes on, results.json has everything.")


@contextmanager
def tracking(use_wandb: bool, directory: RunDirectory) -> Iterator[Tracker]:
    """Open a tracker for the run, and close it also when the training raises.

    W&B's files go to the run's directory, whose config and data set's name go to W&B.
    """
    tracker, exit_code = Tracker(_start(directory) if use_wandb else None), 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.finish(exit_code)


def _start(directory: RunDirectory) -> Any:
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    # From the directory's path, so that a resumed run goes on as the same one; another one after
    # a failed start, because W&B takes the first for in use.
    run_id = hashlib.sha256(str(directory.path).encode()).hexdigest()[:12]
    for attempt, suffix in ((mode, ""), ("offline", "-offline")):
        try:
            run = _init(directory, attempt, run_id + suffix)
        except Exception as error:
            then = "the run goes on without it" if attempt == "offline" else "going offline"
            say(f"⚠️ W&B did not start {attempt} ({_line(error)}); {then}.")
            if attempt == "offline":
                break
            continue
        if attempt == "offline":
            folder = shlex.quote(str(Path(run.dir).parent))
            say(f"W&B is offline; to send the run later: wandb login, wandb sync {folder}")
        return run
    return None


def _init(directory: RunDirectory, mode: str, run_id: str) -> Any:
    import wandb

    session = wandb.setup().settings
    sweep_id = session.sweep_id
    if wandb.run is not None:  # it is the sweep's, if there is one: two runs cannot share its id
        session.sweep_id = None
    try:
        return wandb.init(
            project=PROJECT,
            id=run_id,
            name=f"{directory.path.parent.name} {directory.path.name}",
            dir=directory.path,
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # beside a run that the user has open, which goes on
            resume="allow" if mode == "online" else None,
            config={**directory.results["config"], "dataset": directory.results["dataset"]},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )
    finally:
        session.sweep_id = sweep_id


def _logged_in() -> bool:
    """Is there a key, in the environment or where ``wandb login`` leaves it (~/.netrc)?"""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return requests.utils.get_netrc_auth(host) is not None


def _line(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]
