"""Notebooks 08 and 09: the round loop, and what may be changed about it."""

import io
import math
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from course.checks.toy import toy_app
from course.verdict import Answer, check, expect, on_error, watch
from course.virtual import VirtualGrid
from fedlib import messages
from fedlib.config import Config
from fedlib.data import Dataset
from fedlib.messages import EVALUATE, QUERY, TRAIN
from fedlib.model import State, clone_state, make_model, state_hash
from fedlib.nodes import Nodes, sample
from fedlib.randomness import SERVER, Stream, numpy_generator, torch_generator
from fedlib.run_directory import Round, RunDirectory
from fedlib.server_app import GlobalModel, Server, run_round

# --- notebook 08: one round, on eight toy nodes

VERBS = (TRAIN, QUERY, EVALUATE)
NUM_NODES, NEWCOMER = 8, 7  # the newcomer is there from round 2 on
DEAF = {(QUERY, 4)}  # a message that a partition never gets to
SILENT = {(TRAIN, p) for p in range(NUM_NODES)}
UNWILLING = {(QUERY, p) for p in range(0, NUM_NODES, 2)}  # the odd ones say no
ORDER = (1, 4, 7, 2, 5, 0, 3, 6)  # the partitions in the order of the nodes' ids


def fedlib_round(server: Server, model: State, server_round: int) -> tuple[State, Round]:
    """Run one round as fedlib does, and save it; in silence, as the record says all of it."""
    with redirect_stdout(io.StringIO()):
        following, record = run_round(server, GlobalModel(model), server_round)
        server.directory.save_round(record, following.state)
    return following.state, record


@check
def six_steps(answer: Answer) -> None:
    """One round with its six steps: two in a row, then three in which something is amiss."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            fraction_clients_train=0.4,
            learning_rate=0.02,
            query_timeout=3.0,
            reply_timeout=40.0,
            seed=5,
            dataset="tiny",
            output_dir=folder,
            use_wandb=False,
        )
        dataset = _tiny_dataset(Path(folder, "tiny"))
        broken = sample(range(NUM_NODES - 1), config, 1)[0]
        cases: tuple[tuple[str, int, set[tuple[str, int]], dict[int, str]], ...] = (
            ("", 2, DEAF, {}),
            ("one node fails", 1, set(), {broken: "raises"}),
            ("nobody says yes", 1, UNWILLING, {}),
            ("no reply to TRAIN", 1, SILENT, {}),
        )
        for case, rounds, deaf, faults in cases:
            right = _play(fedlib_round, config, dataset, rounds, _Toys(deaf, faults), case)
            mine = _play(answer, config, dataset, rounds, _Toys(deaf, faults), case)
            for wanted in right:  # a round is compared before the next one is played
                _expect_round(case or f"round {wanted.record.server_round}", next(mine), wanted)


@dataclass(frozen=True)
class _Played:
    """What a round did."""

    before: State
    state: State
    record: Round
    asked: list[tuple[str, int, Message]]  # verb, partition and message, in their order
    written: dict[str, Any]
    saved: dict[str, Any]  # the last record in results.json
    by_id: list[int]  # the partitions that are sampled if the nodes are in the order of their ids
    nodes: "_WatchedNodes"

    def who(self, verb: str) -> list[int]:
        return sorted(p for v, p, _ in self.asked if v == verb)

    def stages(self) -> list[str]:
        verbs = [verb for verb, _, _ in self.asked]
        return [verb for i, verb in enumerate(verbs) if verbs[i - 1 : i] != [verb]]

    def first(self, verb: str) -> Message:
        return next(message for v, _, message in self.asked if v == verb)


class _Toys(VirtualGrid):
    """Toy nodes, some of which never get to some messages."""

    def __init__(self, deaf: set[tuple[str, int]], faults: dict[int, str]) -> None:
        toys = toy_app(faults)

        def app(message: Message, context: Context) -> Message:
            reply = toys(message, context)
            if message.metadata.message_type == EVALUATE and reply.has_content():
                found = messages.decode(messages.EvaluateReply, reply.content)
                p = int(context.node_config["partition-id"])
                better = messages.EvaluateReply(found.num_examples, found.loss_sum, (p + 1) ** 2)
                reply = Message(messages.encode(better), reply_to=message)
            return reply

        def work_s(message: Message) -> float:
            who = message.metadata.message_type, self.holds[message.metadata.dst_node_id]
            return float("inf") if who in deaf else 0.0

        super().__init__(app, NUM_NODES, work_s=work_s)  # type: ignore[arg-type]
        self.newcomer_is_there = False
        self.holds = dict(zip(self.contexts, ORDER, strict=True))
        for node_id, context in self.contexts.items():
            context.node_config["partition-id"] = self.holds[node_id]

    def get_node_ids(self) -> Iterable[int]:
        here = super().get_node_ids()
        return [n for n in here if self.newcomer_is_there or self.holds[n] != NEWCOMER]


@dataclass
class _WatchedNodes(Nodes):
    """Nodes that note how long a roll call may take, and which models are kept during TRAIN."""

    roll_call_s: list[float] = field(default_factory=list)
    num_kept: int = 0

    def roll_call(
        self, timeout_s: float, wait_for_all: bool = False, new_timeout_s: float = math.inf
    ) -> list[int]:
        self.roll_call_s.append(min(timeout_s, new_timeout_s))
        return super().roll_call(timeout_s, wait_for_all, new_timeout_s)

    def ask(self, message_type: str, *given: Any, **named: Any) -> Iterator[tuple[int, Any]]:
        earlier = list[Any]()
        for pair in super().ask(message_type, *given, **named):
            # The loop's own name may still hold the reply before this one, but none before that.
            self.num_kept = max(self.num_kept, sum(model() is not None for model in earlier[:-1]))
            if message_type == TRAIN:
                earlier.append(weakref.ref(next(iter(pair[1].model.values()))))
            yield pair


def _play(
    answer: Callable[..., Any],
    config: Config,
    dataset: Dataset,
    rounds: int,
    grid: _Toys,
    case: str,
) -> Iterator[_Played]:
    """Let a function run rounds, and note what each of them did."""
    generator = torch_generator(config.seed, 0, SERVER, Stream.MODEL)
    state: State = clone_state(make_model(dataset, generator))
    directory = RunDirectory.open(config, dataset.name, NUM_NODES, state)
    with closing(directory):
        nodes = _WatchedNodes(grid)
        server = Server(config, nodes, dataset, "cpu", directory)
        with grid:
            nodes.roll_call(config.query_timeout)
        for server_round in range(1, rounds + 1):
            start, before = len(grid.history), state
            grid.newcomer_is_there = server_round > 1
            nodes.roll_call_s.clear()
            where = case or f"round {server_round}"
            with grid, on_error(Exception, f"(That was in: {where}.)"):
                try:
                    came = answer(server, before, server_round)
                finally:
                    if answer is not fedlib_round and len(grid.history) > start:
                        watch(grid)
            pairs = [(m.metadata, m) for _, m, _ in grid.history[start:]]
            pairs = [(d, m) for d, m in pairs if d.message_type in VERBS]
            held = grid.holds  # a reply goes to the server, which holds nothing
            asked = [
                (d.message_type, held[d.dst_node_id], m) for d, m in pairs if d.dst_node_id in held
            ]
            state, record = _two(came, bool(asked))
            by_id = sorted(held[n] for n in sample(list(grid.get_node_ids()), config, server_round))
            saved = directory.results["rounds"][-1] if directory.results["rounds"] else {}
            written = _written(directory)
            yield _Played(before, state, record, asked, written, saved, by_id, nodes)


def _two(came: Any, has_asked: bool) -> tuple[State, Round]:
    """Return the model and the record, if that is what came."""
    if came in (None, ...) and not has_asked:
        expect("what it returns", None, "")  # which says: not yet
    kinds = [type(x).__name__ for x in came] if isinstance(came, (tuple, list)) else []
    right = len(kinds) == 2 and isinstance(came[0], dict) and isinstance(came[1], Round)
    got = f"({', '.join(kinds)})" if kinds else type(came).__name__
    expect("what it returns", "(dict, Round)" if right else got, "(dict, Round)")
    return came[0], came[1]


def _written(directory: RunDirectory) -> dict[str, Any]:
    latest = directory.path / "latest.pt"
    model = torch.load(latest, weights_only=True)["model"] if latest.is_file() else None
    rounds = [record["server_round"] for record in directory.results["rounds"]]
    return {
        "the rounds in results.json": f"{rounds}",
        "the model in latest.pt": _hash(model) if model else "none",
        "the checkpoints": [file.name for file in sorted(directory.path.glob("checkpoints/*"))],
    }


def _expect_round(case: str, got: _Played, wanted: _Played) -> None:
    """Compare a round with fedlib's: what was sent, what came out, what was written."""
    _expect_asked(case, got, wanted)
    trained = wanted.record.train.num_received > 0
    if trained:
        question = f"{case}, TRAIN adds p + 1 on partition p, so the new model's weights rise by"
        hint = "Is every reply in the mean, once, with its number of examples?"
        mean = float(np.mean([p + 1 for p in got.who(TRAIN)]))
        slips: dict[str, Any] = {
            "Do all nodes weigh the same, whatever they trained on?": f"{mean:.3f}",
            "Is that the model that went in?": "0.000",
        }
        expect(question, _rise(got), _rise(wanted), hint, slips)
    question, hint = f"{case}, the new model's hash", "Close, but not to the bit. Whose mean is it?"
    if not trained:
        question, hint = f"{case}, the model's hash", "With nothing to average, which one goes on?"
    expect(question, _hash(got.state), _hash(wanted.state), hint)
    if wanted.who(EVALUATE):
        sent = messages.decode(messages.EvaluateRequest, got.first(EVALUATE).content).model
        slips = {"Is that the model from before TRAIN?": _hash(got.before)}
        question = f"{case}, the hash of the model in EVALUATE"
        expect(question, _hash(sent), _hash(wanted.state), "Which model is that?", slips)
    _expect_record(case, got.record, wanted.record)
    hints = {
        "the rounds in results.json": "How often is the round saved?",
        "the model in latest.pt": "Which model was saved with the record?",
        "the checkpoints": "Which model is kept, and when is it better than all earlier ones?",
    }
    if not trained:  # a model that nobody has trained may be kept as the first, or not
        del hints["the checkpoints"]
    for what, hint in hints.items():
        expect(f"{case}, {what}", got.written[what], wanted.written[what], hint)
    for name, value in asdict(got.record).items():
        hint = "Was it filled in after `save_round`?"
        expect(f"{case}, {name} in results.json", f"{got.saved[name]}", f"{value}", hint)


def _expect_asked(case: str, got: _Played, wanted: _Played) -> None:
    """Compare who was asked what, in which order and with which time limit."""
    hint = "Has each stage ended before the next one begins?"
    if {*got.stages()} < {*wanted.stages()}:
        hint = "`ask` sends nothing before somebody takes its replies."
    stages, right = (" then ".join(played.stages()) or "nothing" for played in (got, wanted))
    expect(f"{case}, the stages in their order", stages, right, hint)
    for seconds in got.nodes.roll_call_s:
        question = f"{case}, the seconds that the roll call may take"
        hint = "Which time limit of `server.config` is meant?"
        expect(question, seconds, wanted.nodes.roll_call_s[0], hint)
    everybody, sampled = wanted.who(QUERY), wanted.who(TRAIN)
    answered = [p for p in everybody if p != 4]
    hints = {TRAIN: "Whom does `sample` choose?"}
    hints[QUERY] = f"Who is there in this round? (Partition {NEWCOMER} comes in round 2.)"
    hints[EVALUATE] = "Who said yes in time?"
    slips = {
        TRAIN: {
            "Was a sample taken?": everybody,
            "Was the roll called? The ids are in no order.": got.by_id,
        },
        QUERY: {"Are only those asked that trained?": sampled},
        EVALUATE: {
            "Did all of them say yes?": everybody,
            "Does every node that answers say yes?": answered,
            "Are those that trained also the volunteers?": sampled,
        },
    }
    for verb in (QUERY, TRAIN, EVALUATE):  # first, who is there
        question = f"{case}, the partitions that get {verb.upper()}"
        named = {slip: f"{who}" for slip, who in slips[verb].items()}
        expect(question, f"{got.who(verb)}", f"{wanted.who(verb)}", hints[verb], named)
    for verb in wanted.stages():
        ours = wanted.first(verb)
        question = f"{case}, the seconds that {verb.upper()} may take"
        hint = "Which time limit of `server.config` is meant for this stage?"
        expect(question, got.first(verb).metadata.ttl, ours.metadata.ttl, hint)
        told, rightly = _config(got.first(verb)), _config(ours)
        hint = "Does it come from `server`, and belong to this round?"
        expect(f"{case}, the config in {verb.upper()}", told, rightly, hint)
    sent = messages.decode(messages.TrainRequest, got.first(TRAIN).content).model
    question = f"{case}, the hash of the model in TRAIN"
    expect(question, _hash(sent), _hash(got.before), "From which model do the nodes start?")
    question = f"{case}, models of earlier replies that are still held when the third comes"
    expect(question, got.nodes.num_kept, 0, "Is each added to the mean when it comes?")


def _expect_record(case: str, got: Round, wanted: Round) -> None:
    """Compare what two records say, except the training loss and the seconds."""
    counts = "num_sent", "num_received", "num_errors", "num_missing"
    for verb in VERBS:
        hint = "Does `ask` get this stage of the record, and are all of its replies taken?"
        for count in counts:
            mine, right = (getattr(getattr(record, verb), count) for record in (got, wanted))
            expect(f"{case}, record.{verb}.{count}", mine, right, hint)
    hints = {
        "server_round": "",
        "learning_rate": "",
        "num_opted_in": "How many said yes in time?",
        "centralized_accuracy": "Which model, on which test set?",
        "centralized_loss": "Which model, on which test set?",
    }
    federated = ("accuracy", "accuracy_std", "loss", "loss_std")
    hint = "Over which nodes, each counting once?"
    hints |= {f"federated_evaluate_{what}": hint for what in federated}
    for name, hint in hints.items():
        mine, right = getattr(got, name), getattr(wanted, name)
        if mine is None or right is None:
            mine, right = f"{mine}", f"{right}"
            hint = "Was it filled in?" if mine == "None" else hint
        where = " on forty images of noise" if name == "centralized_loss" else ""
        where = (
            " (toy nodes, not real losses)" if name.startswith("federated_evaluate_l") else where
        )
        expect(f"{case}, record.{name}{where}", mine, right, hint)
    hint = "The hash of which model belongs there?"
    expect(f"{case}, record.model_sha256", got.model_sha256[:8], wanted.model_sha256[:8], hint)


def _hash(state: State) -> str:
    return state_hash(state)[:8]


def _rise(played: _Played) -> str:
    """Say by how much the weights have grown on average."""
    moves = [(t - played.before[k]).double().flatten() for k, t in played.state.items()]
    return f"{abs(float(torch.cat(moves).mean())):.3f}"


def _config(message: Message) -> dict[str, Any]:
    content: Any = message.content
    return dict(content["config"])


def _tiny_dataset(folder: Path) -> Dataset:
    """Write forty test images of noise."""
    folder.mkdir()
    rng = numpy_generator(0, 0, 0, Stream.MODEL)
    np.save(folder / "test_images.npy", rng.integers(0, 256, (40, 28, 28), dtype=np.uint8))
    np.save(folder / "test_labels.npy", np.arange(40) % 10)
    return Dataset("tiny", folder, tuple("abcdefghij"), (1, 28, 28), (0.5,), (0.5,))


# --- notebook 09


def fedavgm_step(
    config: Config, model: State, mean: State, memory: State, beta: float = 0.9
) -> tuple[State, State]:
    """FedAvg with momentum on the server (Hsu et al., arXiv:1909.06335): a step for ``run``."""
    old = memory or {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    velocity = {name: beta * old[name] + (mean[name] - model[name]) for name in model}
    return {name: model[name] + velocity[name] for name in model}, velocity


@check
def cosine_rate(answer: Answer) -> None:
    """The cosine schedule, as a pure function of the round."""
    cases = (
        (1, 0.2, 0.2),
        (5, 0.04, 0.022),
        (9, 0.2, 0.02),
        (5, 0.2, 0.11),
        (3, 0.2, 0.1736396103),
    )
    for server_round, initial, wanted in cases:
        question = f"round {server_round} of 9 from {initial}"
        got = answer(server_round, 9, initial)
        half = 0.1 + 0.45 * (1 + math.cos((server_round - 1) / 8))
        shorter = (round(wanted, digits) for digits in range(6))
        slips = {
            "Is there a pi in it?": initial * half,
            "Is `initial` used?": wanted / initial * (0.2 if initial == 0.04 else 0.05),
            "Is it rounded?": next((value for value in shorter if value == got), -1.0),
        }
        expect(question, got, wanted, "What is p in this round?", slips)
    with on_error(ZeroDivisionError, "That was round 1 of 1, from 0.2. What is p there?"):
        expect("the only round of a run, from 0.2", answer(1, 1, 0.2), 0.2)


@check
def flattering_nodes(answer: Answer) -> None:
    """Three nodes whose plain mean accuracy is far above the weighted one."""
    nodes = answer()
    expect("how many nodes", nodes if nodes is None or nodes is ... else len(nodes), 3)
    whole = all(number == int(number) for node in nodes for number in node)
    expect("num_correct and num_examples are counts", whole, True, "How many, of how many?")
    expect("0 <= num_correct <= num_examples > 0", all(0 <= c <= n > 0 for c, n in nodes), True)
    gap = sum(c / n for c, n in nodes) / 3 - sum(c for c, _ in nodes) / sum(n for _, n in nodes)
    got = "at least 0.2" if gap > 0.2 - 1e-9 else f"{gap:.4f}"
    expect("each node once - weighted", got, "at least 0.2", "Which node is large?")


@check
def momentum_step(answer: Answer) -> None:
    """FedAvgM's step on the server; what it remembers is its own affair, if it is in the memory.

    Three rounds, then the first round of another run, then the second round of the first again.
    """
    first: dict[str, float] = {
        "Is that the velocity alone?": 3.0,
        "Does it go against the change? A sign is wrong.": -2.0,
        "Is all of the change in the velocity, or only a share?": 2.5,
        "Is that Nesterov's step, which adds the change once more?": 5.5,
    }
    second = {
        "Where is the old velocity?": 6.0,
        "Where is the change of this round?": 5.5,
        "Is the old velocity multiplied by beta?": 9.0,
        "Is `beta` used?": 4.0 + 0.9 * 3.0 + 2.0,
    }
    memories: list[dict[str, Any]] = [{}]  # by the rounds of the first run
    velocity = "What is the velocity?"
    outside = "Is a velocity kept outside the memory?"
    rounds: tuple[tuple[str, float, float, int, float, dict[str, float], str], ...] = (
        ("round 1", 1.0, 4.0, 0, 4.0, first, velocity),
        ("round 2", 4.0, 6.0, 1, 7.5, second, velocity),
        ("round 3", 7.5, 8.0, 2, 9.75, {}, velocity),
        ("round 1 of another run, memory {}", 1.0, 2.0, 0, 2.0, {}, outside),
        ("round 2 of the first run again", 4.0, 6.0, 1, 7.5, {}, outside),
    )
    for name, before, mean, place, wanted, values, hint in rounds:
        model, means = ({"w": torch.tensor([x]), "b": torch.tensor(x)} for x in (before, mean))
        memory = {k: tensor.clone() for k, tensor in memories[place].items()}
        with on_error((KeyError, TypeError), f"({name.capitalize()}.) What is in memory then?"):
            came = answer(Config(), model, means, memory, beta=0.5)
        if came not in (None, ...):
            two = isinstance(came, (tuple, list)) and len(came) == 2
            expect("two dictionaries are returned", two, True, "The new model, and what else?")
        question = f"{name}, model {before:g}, mean {mean:g}, beta 0.5, new model"
        slips = {slip: {"w": [value], "b": value} for slip, value in values.items()}
        new = came if came in (None, ...) else came[0]
        expect(question, new, {"w": [wanted], "b": wanted}, hint, slips)
        memory = came[1]
        tensors = isinstance(memory, dict) and all(map(torch.is_tensor, memory.values()))
        expect("the memory is a dictionary of tensors", tensors, True, "Can latest.pt hold it?")
        memories.append({k: tensor.clone() for k, tensor in memory.items()})
