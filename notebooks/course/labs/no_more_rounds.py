"""Notebook 14: rounds, and no rounds, among nodes that are slow and nodes that vanish."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from matplotlib.axes import Axes

from course.draw import is_reply
from course.labs import SEEDS, accuracy, first_model, lab_config, run_all, small_dataset
from course.plots import CENTRAL, FEDERATED, WAITING, Span
from course.virtual import VirtualGrid
from fedlib import (
    Config,
    FedAvg,
    Nodes,
    Stage,
    State,
    make_client_app,
    open_dataset,
)
from fedlib.algorithms.asynchronous import FedAsync, FedBuff, Rule, Versioned, discount, run_async
from fedlib.messages import TRAIN, TrainRequest, encode
from fedlib.nodes import sample
from fedlib.training import single_thread

NUM_NODES, IN_FLIGHT = 50, 10
ALPHA = 0.1  # of the Dirichlet distribution
SECONDS, TRIAL_S, EVERY_S = 480, 320, 40  # virtual: of a run, of a trial, between evaluations
UNIT_S, AWAY_S, PATIENCE_S = 3.0, 60.0, 45.0
LOOK_S = 0.6  # a place is empty for so long between two looks, at most
TARGET = 55.0  # percent
TUNING_SEEDS = (6, 7)


@dataclass(frozen=True)
class Case:
    """An arm of the experiment, with the one setting that was chosen for it, and a seed.

    The setting says how far the server moves: the share of the step to the mean in ``FedAvg`` and
    in ``first 7``, which is FedAvg with the first seven replies of ten; in ``FedAsync`` it is
    alpha; in ``FedBuff`` the server's rate.
    """

    arm: str
    setting: float
    seed: int
    seconds: float = SECONDS


ENOUGH = {"FedAvg": IN_FLIGHT, "first 7": 7}  # the replies that a round waits for
SETTINGS = (0.25, 0.5, 1.0)  # each arm's, in the trial
GRID = dict.fromkeys(("FedAvg", "first 7", "FedAsync", "FedBuff"), SETTINGS)
CHOSEN = {"FedAvg": 0.25, "first 7": 0.5, "FedAsync": 0.25, "FedBuff": 0.5}  # by the trial


def speed(partition_id: int) -> int:
    """Return how slow a node is, from 1 to 10: five nodes of each kind."""
    return 1 + partition_id % 10


def is_away(partition_id: int, seconds: float) -> bool:
    """Is a node away? Ten of fifty are, every other minute, and answer nothing meanwhile."""
    return partition_id < 10 and (seconds + 12 * partition_id) // AWAY_S % 2 == 0


class Federation(VirtualGrid):
    """Fifty nodes on a virtual clock: a training takes 3 to 30 seconds, and some nodes vanish."""

    def __init__(self, client_app: ClientApp, num_nodes: int = NUM_NODES) -> None:
        super().__init__(client_app, num_nodes, work_s=self._training_s)

    def _training_s(self, message: Message) -> float:
        if message.metadata.message_type != TRAIN:
            return 0.0
        partition_id = message.metadata.dst_node_id - 2
        if is_away(partition_id, self.seconds):
            return math.inf
        return UNIT_S * speed(partition_id)


class Watch:
    """Notes which model is current at which second; of each span of ``every_s``, the last."""

    def __init__(self, grid: VirtualGrid, model: State, every_s: float = EVERY_S) -> None:
        self.grid, self.every_s = grid, every_s
        self.models, self.began = {0: model}, grid.seconds

    def note(self, model: State) -> None:
        """Say that a model is current from now on."""
        self.models[math.ceil((self.grid.seconds - self.began) / self.every_s)] = model

    def around(self, rule: Rule) -> Rule:
        """Return a rule that notes what it makes."""

        def watched(current: Versioned, sent: Versioned, trained: State) -> Versioned:
            made = rule(current, sent, trained)
            self.note(made.model)
            return made

        return watched

    def at(self, seconds: float) -> State:
        """Return the model that was current at a multiple of ``every_s``."""
        return self.models[max(n for n in self.models if n * self.every_s <= seconds)]


def make_config(seed: int) -> Config:
    """Return the settings that all arms share."""
    own = {"learning_rate_schedule": "constant", "reply_timeout": PATIENCE_S}
    return lab_config(seed, dirichlet_alpha=ALPHA, **own)


def run_rounds(
    grid: VirtualGrid, config: Config, watch: Watch, seconds: float, enough: int, share: float
) -> None:
    """Run FedAvg in rounds of ten nodes, each until ``enough`` have replied, or time is up."""
    nodes, server_round, model = Nodes(grid), 0, watch.at(0)
    online, end = nodes.roll_call(10.0, wait_for_all=True), grid.seconds + seconds
    while grid.seconds < end:
        server_round += 1
        request = TrainRequest(model, server_round, config.dataset, config.learning_rate)
        sampled, mean = sample(online, config, server_round), FedAvg(model)
        replies = nodes.ask(TRAIN, sampled, encode(request), Stage(), config.reply_timeout)
        for _, reply in islice(replies, enough):
            mean.add(reply.model, reply.num_examples)
        made = mean.result()
        model = {k: old + share * (made[k] - old) for k, old in model.items()}
        watch.note(model)


def rule_of(case: Case) -> Rule:
    """Return a case's rule."""
    return FedAsync(case.setting) if case.arm == "FedAsync" else FedBuff(5, case.setting)


def run_case(case: Case, loop: Any = run_async) -> tuple[VirtualGrid, Watch]:
    """Run a case; return the grid with its messages, and what was current when.

    ``loop`` is what runs the arms without rounds: ``run_async``, or the learner's own.
    """
    config = make_config(case.seed)
    grid = Federation(make_client_app(config))
    watch = Watch(grid, first_model(config))
    with single_thread(), grid:
        if case.arm in ENOUGH:
            enough = ENOUGH[case.arm]
            run_rounds(grid, config, watch, case.seconds, enough, case.setting)
        else:
            online = Nodes(grid).roll_call(10.0, wait_for_all=True)
            rule, model = watch.around(rule_of(case)), watch.at(0)
            loop(grid, online, model, rule, config, seconds=case.seconds, in_flight=IN_FLIGHT)
    return grid, watch


def accuracies(case: Case, watch: Watch) -> list[float]:
    """Return the accuracy in percent at each multiple of ``EVERY_S``, from 0 on."""
    dataset, moments = open_dataset(small_dataset()), range(0, int(case.seconds) + 1, EVERY_S)
    models = [watch.at(moment) for moment in moments]
    known = {id(model): model for model in models}
    percent = {key: round(accuracy(model, dataset), 2) for key, model in known.items()}
    return [percent[id(model)] for model in models]


def trainings(grid: VirtualGrid) -> list[dict[str, Any]]:
    """Return who was asked to train when, and when the server had the reply, if it ever had.

    ``staleness`` is how many other replies came in between, which is what FedAsync counts.
    """
    found: dict[str, dict[str, Any]] = {}
    replies = 0
    for message_id, message, at_s in grid.history:
        if message.metadata.message_type != TRAIN:
            continue
        if is_reply(message):
            row = found[message_id]
            row["end"], row["staleness"] = round(at_s, 1), replies - row["staleness"]
            replies += 1
        else:
            node = message.metadata.dst_node_id - 2
            row = {"node": node, "start": round(at_s, 1), "end": None, "staleness": replies}
            found[message_id] = row
    return list(found.values())


def places(rows: Sequence[dict[str, Any]], until_s: float) -> list[Span]:
    """Return the bars of a timeline with a lane for each place: the server fills as many.

    A place is taken from the push to the reply, or for as long as the server waits for one.
    """
    free_at, found = [0.0] * IN_FLIGHT, list[tuple[int, Span]]()
    for row in rows:
        place = min(range(IN_FLIGHT), key=free_at.__getitem__)
        start, lane = row["start"], f"place {place + 1}"
        if start >= until_s:
            break
        if start > free_at[place] + LOOK_S:
            found.append((place, Span(lane, free_at[place], start, WAITING)))
        lost = row["end"] is None
        free_at[place] = start + PATIENCE_S if lost else row["end"]
        kind = "no reply" if lost else "TRAIN"
        found.append((place, Span(lane, start, min(until_s, free_at[place]), kind)))
    for place, moment in enumerate(free_at):
        if moment < until_s:
            found.append((place, Span(f"place {place + 1}", moment, until_s, WAITING)))
    kinds = ("TRAIN", "no reply", WAITING)
    return [s for _, s in sorted(found, key=lambda row: (row[0], kinds.index(row[1].kind)))]


def draw_places(axes: Axes, rows: Sequence[dict[str, Any]], until_s: float, title: str) -> None:
    """Draw these bars into axes: blue trains, hatched red never replies, thin grey waits."""
    looks = {"TRAIN": (CENTRAL, ""), "no reply": (FEDERATED, "//"), WAITING: ("#bbbbbb", "")}
    for span in places(rows, until_s):
        (colour, hatch), height = looks[span.kind], 0.2 if span.kind == WAITING else 0.75
        lane, width = int(span.lane.split()[1]), span.end - span.start
        axes.barh(
            lane, width, height, span.start, color=colour, hatch=hatch, edgecolor="white", lw=0.6
        )
    axes.set(title=title, xlim=(0, until_s), xlabel="seconds", yticks=[1, 5, 10], ylabel="place")
    axes.invert_yaxis()


def replies_by_speed(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Return how many replies came from nodes of each speed, the fastest first."""
    speeds = [speed(row["node"]) for row in rows if row["end"] is not None]
    return [int(number) for number in np.bincount(speeds, minlength=11)[1:]]


def weight_by_speed(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the sum of the discounts for staleness, of the replies of each speed."""
    came = [row for row in rows if row["end"] is not None]
    weights = [discount(row["staleness"]) for row in came]
    sums = np.bincount([speed(row["node"]) for row in came], weights, minlength=11)[1:]
    return [round(float(number), 2) for number in sums]


def seconds_to(target: float, percents: Sequence[float]) -> float | None:
    """Return the first of two evaluations in a row that reach an accuracy; None if none do."""
    pairs = enumerate(pairwise(percents))
    return next((EVERY_S * n for n, pair in pairs if min(pair) >= target), None)


def best_in_trial(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the setting of each arm with the highest accuracy, over a trial's whole length."""
    scores = dict[tuple[str, float], list[float]]()
    for row in rows:
        scores.setdefault((row["arm"], row["setting"]), []).append(mean_accuracy(row))
    means = {key: float(np.mean(values)) for key, values in scores.items()}
    arms = dict.fromkeys(arm for arm, _ in means)
    return {a: max((m, x) for (arm, x), m in means.items() if arm == a)[1] for a in arms}


def mean_accuracy(row: dict[str, Any]) -> float:
    """Return the mean over a run's evaluations, without the one before any training."""
    return float(np.mean(row["accuracy"][1:]))


def play(case: Case) -> dict[str, Any]:
    """Run a case, and return what is saved of it."""
    grid, watch = run_case(case)
    rows = trainings(grid)
    return {
        "arm": case.arm,
        "setting": case.setting,
        "seed": case.seed,
        "accuracy": accuracies(case, watch),
        "pushed": len(rows),
        "by_speed": replies_by_speed(rows),
        "weight_by_speed": weight_by_speed(rows),
        "first": [row for row in rows if row["start"] < 150] if case.seed == SEEDS[0] else [],
    }


def experiment() -> dict[str, Any]:
    """Run each arm with what was chosen on five seeds, and the trial that it was chosen by."""
    trial = [
        Case(arm, x, seed, TRIAL_S) for arm, xs in GRID.items() for x in xs for seed in TUNING_SEEDS
    ]
    cases = [Case(arm, setting, seed) for arm, setting in CHOSEN.items() for seed in SEEDS]
    rows = run_all(play, [*cases, *trial])
    return {"runs": rows[: len(cases)], "tuning": rows[len(cases) :]}
