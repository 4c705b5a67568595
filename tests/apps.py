"""Apps, grids and readers of results that more than one test file needs."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlib import Config, LocalGrid, make_client_app, run, server_step
from fedlib.server_app import ServerStep

NUM_NODES = 4
STAGES = ("train", "query", "evaluate")

OTHER: dict[str, list[Any]] = {
    "fraction_clients_train": [1.0],
    "local_epochs": [2],
    "batch_size": [16],
    "learning_rate": [0.01],
    "learning_rate_schedule": ["constant", "step", "cosine"],
    "learning_rate_decay": [0.25],
    "learning_rate_step_size": [2],
    "momentum": [0.0],
    "augmentation": [False],
    "dirichlet_alpha": [10.0],
    "seed": [43],
}
"""Of each setting that changes what a round computes, other values than the default."""


def make_config(folder: Path, output_dir: Path, **values: Any) -> Config:
    """Return a config in which nodes answer at once."""
    settings: dict[str, Any] = {
        "num_server_rounds": 2,
        "fraction_clients_train": 0.5,
        "batch_size": 8,
        "dataset": str(folder),
        "query_timeout": 20.0,
        "query_max_delay": 0.0,
        "use_wandb": False,
        "output_dir": str(output_dir),
    }
    return Config(**{**settings, **values})


class Watched(ClientApp):
    """The real app between two hooks, which keeps the messages and their replies.

    Args:
        config: The run's config.
        before: Gets each message and the node's partition, and may raise.
        after: Gets the reply too, and returns the reply that is sent.
    """

    def __init__(
        self,
        config: Config,
        before: Callable[[Message, int], object] = lambda message, partition: None,
        after: Callable[[Message, int, Message], Message] = lambda message, partition, reply: reply,
    ) -> None:
        super().__init__()
        self.inner, self.before, self.after = make_client_app(config), before, after
        self.replies: list[Message] = []

    def __call__(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        self.before(message, partition)
        self.replies.append(self.after(message, partition, self.inner(message, context)))
        return self.replies[-1]

    def count(self, verb: str) -> int:
        """Return how many messages of a type were answered."""
        return sum(reply.metadata.message_type == verb for reply in self.replies)


class FlakyGrid(LocalGrid):
    """A LocalGrid that can lose replies, and whose nodes can come and go.

    Args:
        client_app: The app that every node runs.
        lose: Which replies never arrive.
    """

    def __init__(
        self, client_app: ClientApp, lose: Callable[[Message], bool] = lambda reply: False
    ) -> None:
        super().__init__(client_app, NUM_NODES)
        self.lose, self.online = lose, list(self.contexts)

    def get_node_ids(self) -> Iterable[int]:
        return self.online

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for reply in super().pull_messages(message_ids) if not self.lose(reply)]


def round_of(message: Message) -> int:
    """Return the round that a TRAIN, QUERY or EVALUATE message belongs to."""
    return int(message.content["config"]["server-round"])


def run_directory(config: Config) -> Path:
    """Return the only run directory in the output directory."""
    [path] = Path(config.output_dir).glob("*/*")
    return path


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Read results.json as strict JSON, and check what holds for every run."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"results.json holds {constant}, which is not JSON")

    text = (path / "results.json").read_text(encoding="utf-8")
    rounds: list[dict[str, Any]] = json.loads(text, parse_constant=refuse)["rounds"]
    for stage in (record[name] for record in rounds for name in STAGES):
        outcomes = [stage[f"num_{what}"] for what in ("received", "errors", "missing")]
        assert stage["num_sent"] == sum(outcomes) and min(outcomes) >= 0, stage
    return rounds


def without_seconds(value: Any) -> Any:
    """Return rounds without their times, which differ from run to run."""
    if isinstance(value, list):
        return [without_seconds(item) for item in value]
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.endswith("seconds")}
    return value


def finished_rounds(
    config: Config, app: ClientApp | None = None, step: ServerStep = server_step
) -> list[dict[str, Any]]:
    """Run on a LocalGrid and return the rounds' records."""
    run(LocalGrid(app or make_client_app(config), NUM_NODES), config, step)
    return read_rounds(run_directory(config))
