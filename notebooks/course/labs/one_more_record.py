"""Notebook 13: FedAvg, and four algorithms that change one thing each.

Every arm has the nodes, the samples, the batches, the first model and the number of local steps of
the same seed's FedAvg. Hyper-parameters are chosen by ``tune`` on a seed that is not reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedProx, Strategy

from course.labs import SEEDS, accuracy, first_model, lab_config, run_all
from fedlib import (
    Config,
    FedAvg,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    State,
    load_partition,
    make_client_app,
    make_model,
    open_dataset,
    server_step,
)
from fedlib.algorithms.common import refuse
from fedlib.algorithms.fedprox import handle_proximal
from fedlib.algorithms.messages import (
    PROXIMAL,
    PROXIMAL_ACTION,
    SCAFFOLD,
    SCAFFOLD_ACTION,
    ProximalRequest,
    ScaffoldReply,
    ScaffoldRequest,
)
from fedlib.algorithms.scaffold import (
    LocalRound,
    ScaffoldMean,
    handle_scaffold,
    local_round,
    zero_control,
)
from fedlib.algorithms.server_optimizers import fedadam, fedavgm
from fedlib.client_app import Handler, Node, answer, handle_train
from fedlib.messages import TRAIN, TrainReply, TrainRequest, encode, encode_model
from fedlib.nodes import sample
from fedlib.server_app import ServerStep

NUM_NODES = 20
ALPHAS, ROUNDS = (0.1, 1.0), {1: 16, 5: 6}
"""How much the nodes differ; and by the number of local epochs, that of the rounds."""
EVERY = {1: 2, 5: 1}
"""After how many rounds the model is evaluated."""
TUNING_SEED = 6
LEARNING_RATE = 0.05
"""Of the nodes. Of 0.05, 0.1 and 0.2, FedAvg and SCAFFOLD did about as well with each (seed 6)."""
GRID: dict[str, tuple[dict[str, float], ...]] = {
    "FedAvg": ({},),
    "FedProx": ({"mu": 0.01}, {"mu": 0.1}, {"mu": 1.0}),
    "FedAvgM": (
        {"momentum": 0.9, "learning_rate": 1.0},
        {"momentum": 0.5, "learning_rate": 1.0},
        {"momentum": 0.9, "learning_rate": 0.3},
    ),
    "FedAdam": ({"learning_rate": 0.003}, {"learning_rate": 0.01}, {"learning_rate": 0.03}),
    "SCAFFOLD": ({},),
}
CHOSEN = {"FedAvg": 0, "FedProx": 0, "FedAvgM": 1, "FedAdam": 2, "SCAFFOLD": 0}
"""What ``tune`` chose of it."""
FLOWER_KEYS: dict[str, Any] = {"arrayrecord_key": "model", "fraction_evaluate": 0.0}
"""For Flower's strategies, which call the model's record ``arrays`` unless told otherwise."""


@dataclass(frozen=True)
class Case:
    """One run."""

    arm: str
    alpha: float
    epochs: int
    seed: int
    choice: int  # which of the arm's settings in GRID


def make_config(alpha: float, epochs: int, seed: int) -> Config:
    """Return the config that all arms share."""
    return lab_config(
        seed,
        num_server_rounds=ROUNDS[epochs],
        fraction_clients_train=0.2,
        local_epochs=epochs,
        learning_rate=LEARNING_RATE,
        learning_rate_schedule="constant",
        momentum=0.0,
        augmentation=False,
        dirichlet_alpha=alpha,
    )


def make_app(config: Config, local_round: LocalRound = local_round) -> ClientApp:
    """Return fedlib's ClientApp, with a handler more for FedProx and one for SCAFFOLD."""
    app = make_client_app(config)
    app.train(PROXIMAL_ACTION)(partial(answer, handle_proximal, config=config))
    scaffold = partial(handle_scaffold, local_round=local_round)
    app.train(SCAFFOLD_ACTION)(partial(answer, scaffold, config=config))
    return app


def first_control(config: Config) -> State:
    """Return the control variate from which server and nodes start: zeros."""
    return zero_control(make_model(open_dataset(config.dataset), torch.Generator()))


@cache
def num_examples(config: Config, num_nodes: int) -> tuple[int, ...]:
    """Return on how many examples each partition trains: in a deployment, nodes would say it."""
    who = num_nodes, config.dirichlet_alpha, config.seed
    dataset = open_dataset(config.dataset)
    return tuple(len(load_partition(dataset, *who, i).train) for i in range(num_nodes))


def averaging_round(
    nodes: Nodes, config: Config, model: State, server_round: int, mu: float | None = None
) -> tuple[State, int]:
    """Let a sample of the nodes train; return the mean of their models, and the bytes it took.

    With a ``mu`` the message is FedProx's, else FedAvg's.
    """
    stage, mean = Stage(), FedAvg(model)
    told = model, server_round, config.dataset, config.learning_rate_at(server_round)
    message_type, request = TRAIN, TrainRequest(*told)
    if mu is not None:
        message_type, request = PROXIMAL, ProximalRequest(*told, mu)
    sampled = sample(nodes.roll_call(config.roll_call_timeout, True), config, server_round)
    content, wait_s = encode(request), config.reply_timeout
    for _, reply in nodes.ask(message_type, sampled, content, stage, wait_s, TrainReply):
        mean.add(reply.model, reply.num_examples)
    return mean.result(), stage.bytes_sent + stage.bytes_received


def averaging(
    grid: Grid, config: Config, step: ServerStep = server_step, mu: float | None = None
) -> Iterator[tuple[State, int]]:
    """Run FedAvg, or FedProx with a ``mu``, or another step; yield models and bytes by round."""
    model, nodes = first_model(config), Nodes(grid)
    memory: State = {}
    for server_round in range(1, config.num_server_rounds + 1):
        mean, num_bytes = averaging_round(nodes, config, model, server_round, mu)
        model, memory = step(config, model, mean, memory)
        yield model, num_bytes


def scaffold_round(
    nodes: Nodes, config: Config, model: State, control: State, server_round: int
) -> tuple[tuple[State, State], int]:
    """Run a round of SCAFFOLD: the next model and control variate, and the bytes it took."""
    stage, mean = Stage(), ScaffoldMean(model, control)
    rate = config.learning_rate_at(server_round)
    content = encode(ScaffoldRequest(model, server_round, config.dataset, rate, control))
    sampled = sample(nodes.roll_call(config.roll_call_timeout, True), config, server_round)
    wait_s, total = config.reply_timeout, sum(num_examples(config, nodes.num_partitions))
    for node_id, reply in nodes.ask(SCAFFOLD, sampled, content, stage, wait_s, ScaffoldReply):
        try:
            mean.add(reply, reply.num_examples)
        except ReplyError as error:
            refuse(nodes, stage, node_id, error)
    return mean.result(total), stage.bytes_sent + stage.bytes_received


def scaffold(grid: Grid, config: Config) -> Iterator[tuple[State, int]]:
    """Run SCAFFOLD; yield models and bytes by round."""
    model, nodes = first_model(config), Nodes(grid)
    control = first_control(config)
    for server_round in range(1, config.num_server_rounds + 1):
        (model, control), num_bytes = scaffold_round(nodes, config, model, control, server_round)
        yield model, num_bytes


def with_flowers_own(strategy: Strategy, config: Config, num_nodes: int) -> list[State]:
    """Run a strategy of Flower's on nodes of ours; return its models, the first one included.

    Our table of messages is one of those that Flower's strategies can speak: told that the model's
    record is called ``model``, FedAvg sends a TrainRequest, and FedProx a ProximalRequest.

    Args:
        strategy: Made with ``FLOWER_KEYS``, and every node in each round.
        config: With a constant learning rate, as the strategy sends the same in every round.
        num_nodes: How many nodes there are.
    """
    app, models = ClientApp(), list[State]()
    handler = handle_proximal if isinstance(strategy, FedProx) else handle_train
    app.train()(partial(answer, partial(_in_float32, handler), config=config))

    def keep(server_round: int, arrays: ArrayRecord) -> None:
        models.append(dict(arrays.to_torch_state_dict()))

    told: dict[str, Any] = {"dataset": config.dataset, "learning-rate": config.learning_rate}
    strategy.start(
        LocalGrid(app, num_nodes),
        encode_model(first_model(config)),
        num_rounds=config.num_server_rounds,
        train_config=ConfigRecord(told),
        evaluate_fn=keep,
    )
    return models


def _in_float32(handler: Handler, message: Message, node: Node) -> RecordDict:
    """Handle a message whose model may be in float64, as FedAdam's of Flower 1.42 is."""
    arrays: Any = message.content[FLOWER_KEYS["arrayrecord_key"]]
    state = {name: tensor.float() for name, tensor in arrays.to_torch_state_dict().items()}
    message.content[FLOWER_KEYS["arrayrecord_key"]] = encode_model(state)
    return handler(message, node)


def round_by_round(
    models: list[State], config: Config, num_nodes: int, step: ServerStep, mu: float | None
) -> list[State]:
    """Make the second of these models of the first, the third of the second, and so on.

    So that a difference of rounding does not grow from round to round, as training makes it.
    """
    nodes, made = Nodes(LocalGrid(make_app(config), num_nodes)), list[State]()
    memory: State = {}
    for server_round, sent in enumerate(models[:-1], 1):
        model = {name: tensor.float() for name, tensor in sent.items()}
        mean, _ = averaging_round(nodes, config, model, server_round, mu)
        following, memory = step(config, model, mean, memory)
        made.append(following)
    return made


def largest_difference(a: State, b: State) -> float:
    """Return by how much two models differ where they differ most."""
    return max(float((a[name].double() - b[name]).abs().max()) for name in a)


def rounds_of(arm: str, settings: dict[str, float]) -> Callable[..., Iterator[tuple[State, int]]]:
    """Return the loop of an arm: a function of a grid and a config."""
    if arm == "SCAFFOLD":
        return scaffold
    if arm == "FedProx":
        return partial(averaging, mu=settings["mu"])
    steps: dict[str, Callable[..., ServerStep]] = {"FedAvgM": fedavgm, "FedAdam": fedadam}
    return partial(averaging, step=steps[arm](**settings)) if arm in steps else averaging


def run_case(
    case: Case, num_rounds: int | None = None, local_round: LocalRound = local_round
) -> dict[str, list[float]]:
    """Run one case; return accuracies (percent) and megabytes so far, where it was evaluated.

    Args:
        case: Which one.
        num_rounds: After how many rounds it ends; all of them if not given.
        local_round: What a node of SCAFFOLD does.
    """
    config = make_config(case.alpha, case.epochs, case.seed)
    dataset, grid = open_dataset(config.dataset), LocalGrid(make_app(config), NUM_NODES)
    accuracies, megabytes, total = list[float](), list[float](), 0
    play = rounds_of(case.arm, GRID[case.arm][case.choice])
    for server_round, (model, num_bytes) in enumerate(play(grid, config), 1):
        total += num_bytes
        if server_round % EVERY[case.epochs] == 0:
            accuracies.append(round(accuracy(model, dataset), 2))
            megabytes.append(round(total / 1e6, 3))
        if server_round == num_rounds:
            break
    return {"accuracy": accuracies, "megabytes": megabytes}


def late(case: dict[str, list[float]], share: float = 1.0) -> float:
    """Return the mean accuracy over the second half of a run, which is less noisy than its end.

    With a ``share`` of 0.5 the run is over after half of its rounds.
    """
    end = round(share * len(case["accuracy"]))
    return float(np.mean(case["accuracy"][end // 2 : end]))


def tune() -> list[dict[str, Any]]:
    """Try every setting of GRID in all four situations; return the mean of their accuracies."""
    settings = [
        (arm, i) for arm, tried in GRID.items() if len(tried) > 1 for i in range(len(tried))
    ]
    cases = [
        Case(arm, alpha, epochs, TUNING_SEED, i)
        for arm, i in settings
        for alpha in ALPHAS
        for epochs in ROUNDS
    ]
    done = dict(zip(cases, run_all(run_case, cases), strict=True))
    rows = []
    for arm, i in settings:
        found = [late(done[case]) for case in cases if (case.arm, case.choice) == (arm, i)]
        rows.append({"arm": arm, **GRID[arm][i], "accuracy": round(float(np.mean(found)), 2)})
    return rows


def reported() -> list[dict[str, Any]]:
    """Run every arm in every situation with the seeds that are reported."""
    cases = [
        Case(arm, alpha, epochs, seed, CHOSEN[arm])
        for seed in SEEDS
        for alpha in ALPHAS
        for epochs in ROUNDS
        for arm in GRID
    ]
    keys = ("arm", "alpha", "epochs", "seed")
    done = run_all(run_case, cases)
    return [
        {key: getattr(case, key) for key in keys} | found
        for case, found in zip(cases, done, strict=True)
    ]


def experiment() -> dict[str, Any]:
    """Make the whole result: what was tried on the seed for tuning, and what is reported."""
    return {"tuning": tune(), "runs": reported()}
