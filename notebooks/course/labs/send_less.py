"""Notebook 17: smaller updates, and a last layer that stays at home."""

from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp

from course.labs import SEEDS, accuracy, lab_config, run_all
from fedlib import (
    Config,
    FedAvg,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    State,
    make_client_app,
    open_dataset,
)
from fedlib.algorithms.common import initial_model, moved, refuse
from fedlib.algorithms.compressed_reply import handle_compressed
from fedlib.algorithms.compression import Scheme, unpack
from fedlib.algorithms.messages import (
    COMPRESSED,
    COMPRESSED_ACTION,
    EVALUATE_PERSONAL,
    EVALUATE_TUNED,
    PERSONAL,
    PERSONAL_ACTION,
    TUNED_ACTION,
    CompressedReply,
    CompressedRequest,
)
from fedlib.algorithms.personal_head import (
    handle_evaluate_personal,
    handle_evaluate_tuned,
    handle_train_personal,
    split_model,
)
from fedlib.client_app import answer
from fedlib.messages import (
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    encode,
)
from fedlib.nodes import sample

ALPHAS = (0.1, 1.0)
NUM_NODES, NUM_ROUNDS = 50, 15
HALF_WAY, NUM_REPLACED = 7, 10  # after this round, so many nodes are replaced
TIMEOUT_S = 600.0

How = Scheme | str  # a scheme; or PERSONAL, or TRAIN as it is
ARMS: dict[str, How] = {
    "FedAvg": TRAIN,
    "top 10 %": Scheme(share=0.1),
    "top 10 %, feedback": Scheme(share=0.1, feedback=True),
    "8 bits": Scheme(bits=8),
    "2 bits": Scheme(bits=2),
}
FEEDBACK, HEADS = "top 10 %, feedback", "personal head"
ARMS[HEADS] = PERSONAL
LOSING = ", nodes replaced"  # at the end of an arm's name
TUNED = {"tuned slowly": NUM_ROUNDS, "tuned fast": 1}  # with the learning rate of which round
Case = tuple[float, str, int]  # alpha, arm and seed


def settings(alpha: float, seed: int, **values: Any) -> Config:
    """Return the run's config: the course's defaults, on the labs' small data set."""
    given = {"num_server_rounds": NUM_ROUNDS, "dirichlet_alpha": alpha}
    return lab_config(seed, **given | values)


def make_app(config: Config) -> ClientApp:
    """Return fedlib's ClientApp with this lab's four messages more."""
    app = make_client_app(config)
    for register, handler in (
        (app.train(COMPRESSED_ACTION), handle_compressed),
        (app.train(PERSONAL_ACTION), handle_train_personal),
        (app.evaluate(PERSONAL_ACTION), handle_evaluate_personal),
        (app.evaluate(TUNED_ACTION), handle_evaluate_tuned),
    ):
        register(partial(answer, handler, config=config))
    return app


def rounds(grid: LocalGrid, config: Config, how: How) -> Iterator[tuple[int, State, Stage]]:
    """Train, and yield after each round its number, the global model (or body), and its counts.

    Between two rounds, the caller may do to the nodes what he likes.
    """
    nodes, dataset = Nodes(grid), open_dataset(config.dataset)
    model: State = initial_model(dataset, config.seed)
    if how == PERSONAL:
        model = split_model(model)[0]
    for server_round in range(1, config.num_server_rounds + 1):
        online = nodes.roll_call(config.roll_call_timeout, wait_for_all=True)
        sampled, stage = sample(online, config, server_round), Stage()
        rate = config.learning_rate_at(server_round)
        request = TrainRequest(model, server_round, config.dataset, rate)
        fedavg = FedAvg(model)
        for state, num_examples in ask_to_train(nodes, sampled, request, how, stage):
            fedavg.add(state, num_examples)
        model = fedavg.result()
        yield server_round, model, stage


def ask_to_train(
    nodes: Nodes, sampled: Collection[int], request: TrainRequest, how: How, stage: Stage
) -> Iterator[tuple[State, int]]:
    """Ask nodes to train; yield each usable model with its weight. Others are problems."""
    if not isinstance(how, Scheme):
        content = encode(request)
        for _, reply in nodes.ask(how, sampled, content, stage, TIMEOUT_S, kind=TrainReply):
            yield reply.model, reply.num_examples
        return
    content = encode(CompressedRequest(**vars(request), **asdict(how)))
    for node_id, reply in nodes.ask(
        COMPRESSED, sampled, content, stage, TIMEOUT_S, kind=CompressedReply
    ):
        try:
            update = unpack(reply.update, how, request.model)
        except ReplyError as error:
            refuse(nodes, stage, node_id, error)
            continue
        yield moved(request.model, update), reply.num_examples


def ask_to_evaluate(
    grid: LocalGrid,
    config: Config,
    model: State,
    message_type: str,
    partitions: Collection[int] = range(NUM_NODES),
    learning_rate: float = 0.0,
) -> list[float]:
    """Return nodes' accuracies in percent, each on its own validation split, by partition.

    Nodes that tune a head train as in the round after the last, with this learning rate.
    """
    nodes, stage, server_round = Nodes(grid), Stage(), config.num_server_rounds + 1
    online = nodes.roll_call(config.roll_call_timeout, wait_for_all=True)
    asked = [node_id for node_id in online if nodes.partitions[node_id] in partitions]
    request: Any = EvaluateRequest(model, server_round, config.dataset)
    if message_type == EVALUATE_TUNED:
        request = TrainRequest(model, server_round, config.dataset, learning_rate)
    content = encode(request)
    replies = nodes.ask(message_type, asked, content, stage, TIMEOUT_S, kind=EvaluateReply)
    by_node = {node_id: 100 * reply.accuracy for node_id, reply in replies}
    if stage.problems:
        raise ReplyError(stage.problems[0])
    return [by_node[node_id] for node_id in asked]


def replace_nodes(grid: LocalGrid, partitions: Collection[int]) -> None:
    """Let new nodes take the place of some: the data are the same, and the state is empty."""
    for context in grid.contexts.values():
        if context.node_config["partition-id"] in partitions:
            context.state.clear()


def with_memory(grid: LocalGrid) -> list[int]:
    """Return the partitions of the nodes that keep something."""
    contexts = grid.contexts.values()
    return [int(c.node_config["partition-id"]) for c in contexts if c.state]


def run_case(case: Case) -> dict[str, Any]:
    """Run one arm with one seed, and return what the pictures need."""
    alpha, arm, seed = case
    config = settings(alpha, seed)
    grid, how = LocalGrid(make_app(config), NUM_NODES), ARMS[arm.removesuffix(LOSING)]
    dataset, by_round, of_replaced = open_dataset(config.dataset), list[float](), list[float]()
    replaced: list[int] = []
    for server_round, model, stage in rounds(grid, config, how):
        if stage.problems:
            raise ReplyError(stage.problems[0])
        if server_round == HALF_WAY and (keepers := with_memory(grid)):
            rng = np.random.default_rng([seed, NUM_REPLACED])
            replaced = sorted(rng.choice(keepers, NUM_REPLACED, replace=False).tolist())
            if arm.endswith(LOSING):
                replace_nodes(grid, replaced)
        if how != PERSONAL:
            by_round.append(round(accuracy(model, dataset), 2))
        elif server_round >= HALF_WAY:
            own = ask_to_evaluate(grid, config, model, EVALUATE_PERSONAL, replaced)
            of_replaced.append(round(float(np.mean(own)), 2))
    found: dict[str, Any] = {"sent": stage.bytes_sent, "received": stage.bytes_received}
    if how == PERSONAL:
        found |= {"of_replaced": of_replaced, "trained": with_memory(grid)}
        found["nodes"] = ask_to_evaluate(grid, config, model, EVALUATE_PERSONAL)
    else:
        found["accuracy"] = by_round
    if how == TRAIN:
        found["nodes"] = ask_to_evaluate(grid, config, model, EVALUATE)
        for name, server_round in TUNED.items():
            rate = config.learning_rate_at(server_round)
            own = ask_to_evaluate(grid, config, model, EVALUATE_TUNED, learning_rate=rate)
            found[name] = own
    rounded = ("nodes", *TUNED)
    return {k: [round(x, 1) for x in v] if k in rounded else v for k, v in found.items()}


def cases() -> list[Case]:
    """Return the experiment: every arm with both alphas, and two of them with nodes replaced."""
    whole = [(alpha, arm, seed) for alpha in ALPHAS for arm in ARMS for seed in SEEDS]
    heads = [(ALPHAS[0], HEADS + LOSING, seed) for seed in SEEDS]
    residuals = [(ALPHAS[0], FEEDBACK + LOSING, seed) for seed in SEEDS]
    return whole + heads + residuals


def experiment() -> dict[str, Any]:
    """Run all of it: what came, by alpha, arm and seed."""
    result: dict[str, Any] = {}
    listed = cases()
    for (alpha, arm, seed), found in zip(listed, run_all(run_case, listed), strict=True):
        result.setdefault(f"{alpha:g}", {}).setdefault(arm, {})[str(seed)] = found
    return result
