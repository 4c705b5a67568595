"""The ServerApp: a ``for`` loop, and the six steps that make a round."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedlib import messages
from fedlib.aggregation import FedAvg, server_step
from fedlib.config import Config
from fedlib.console import say, tidy_flower_log
from fedlib.data import Dataset, find_source, load_test, open_dataset, partition_indices
from fedlib.errors import FedlibError, describe
from fedlib.messages import EVALUATE, QUERY, TRAIN, EvaluateReply, encode
from fedlib.model import State, clone_state, make_model, state_hash
from fedlib.nodes import Nodes, sample
from fedlib.randomness import SERVER, Stream, torch_generator
from fedlib.run_directory import Round, RunDirectory, Stage, finite, mean_and_std
from fedlib.tracking import tracking
from fedlib.training import Weighted, evaluate, pick_device, single_thread

FEW_NODES = 10

ServerStep = Callable[[Config, State, State, State], tuple[State, State]]
"""What ``server_step`` is: config, model, mean and memory go in, model and memory come out."""


@dataclass(frozen=True)
class GlobalModel:
    """The global model between two rounds."""

    state: State
    memory: State = field(default_factory=dict)  # of the server's step

    @cached_property
    def arrays(self) -> ArrayRecord:
        """The state as it is sent, serialised once: EVALUATE and the next TRAIN send the same."""
        return messages.encode_model(self.state)


@dataclass(frozen=True)
class Server:
    """What stays the same from round to round."""

    config: Config
    nodes: Nodes
    dataset: Dataset  # every node is told its name
    device: str  # where the global model is evaluated
    directory: RunDirectory
    step: ServerStep = server_step


def make_server_app(config: Config | None = None) -> ServerApp:
    """Return the ServerApp.

    Without a config, it is read from ``context.run_config``, which ``flwr run`` fills and
    ``simulate`` leaves empty.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tidy_flower_log()
        try:
            run(grid, config or Config.from_run_config(context.run_config))
        except Exception as error:
            say(f"❌ {error if isinstance(error, FedlibError) else describe(error)}")
            raise

    return app


def run(grid: Grid, config: Config, step: ServerStep = server_step) -> State:
    """Train for ``config.num_server_rounds`` rounds and return the last global model.

    ``step`` makes the next global model of the mean: a function of your own is another algorithm.

    Raises:
        FedlibError: Something that a person can put right; what was written stays.
    """
    server, model, first_round = start(grid, config, step)
    with closing(server.directory) as directory, tracking(config.use_wandb, directory) as tracker:
        for server_round in range(first_round, config.num_server_rounds + 1):
            say(f"\n🔄 Starting round {server_round}/{config.num_server_rounds}")
            try:
                model, record = run_round(server, model, server_round)
            except FedlibError as error:
                if server_round == 1:
                    raise
                raise FedlibError(
                    f"{error}; to go on later: resume-from={directory.path}"
                ) from error
            directory.save_round(record, model.state, model.memory)
            tracker.log(record)
        if not directory.trained_rounds:
            reasons = [text for r in directory.results["rounds"] for text in r["train"]["problems"]]
            raise FedlibError(
                f"no node's training could be used; if it diverged (nan), lower learning-rate; "
                f"the last problem: {reasons[-1]}"
            )
    say(f"\n🏁 Finished; results in {directory.path}")
    return model.state


def start(
    grid: Grid, config: Config, step: ServerStep = server_step
) -> tuple[Server, GlobalModel, int]:
    """Check what can be checked before any training; return the model and the first round."""
    device = pick_device(config.server_device)
    say(f"📦 Data set: {find_source(config.dataset)}")
    dataset = open_dataset(config.dataset)
    generator = torch_generator(config.seed, 0, SERVER, Stream.MODEL)
    model, first_round = GlobalModel(clone_state(make_model(dataset, generator))), 1
    _ = model.arrays  # raises where it cannot be sent
    nodes = Nodes(grid)
    num_nodes = len(nodes.roll_call(config.roll_call_timeout, wait_for_all=True))
    partition_indices(dataset, nodes.num_partitions, config.dirichlet_alpha, config.seed)
    directory = RunDirectory.open(config, dataset.name, nodes.num_partitions, model.state)
    say(f"💾 Results go to {directory.path}")
    if num_nodes < nodes.num_partitions:
        say(f"⚠️ Only {num_nodes} of {nodes.num_partitions} nodes are there; going on.")
    elif num_nodes < FEW_NODES:
        say(
            f"⚠️ Only {num_nodes} nodes take part. In a simulation, flwr run takes fifty with "
            f'--federation-config "num-supernodes=50 client-resources-num-cpus=1".'
        )
    if latest := directory.latest:
        model, first_round = GlobalModel(latest.model, latest.memory), latest.server_round + 1
        done = latest.server_round >= config.num_server_rounds
        then = "nothing is left to do; raise num-server-rounds to go on" if done else "going on"
        say(f"⏩ {latest.server_round} rounds are done, {then}")
    return Server(config, nodes, dataset, device, directory, step), model, first_round


@single_thread()  # the clients are at work: threads would wait for each other
def run_round(server: Server, model: GlobalModel, server_round: int) -> tuple[GlobalModel, Round]:
    """Run one round: a global model goes in, the next one and the round's record come out."""
    config, nodes, dataset = server.config, server.nodes, server.dataset.name
    record, began = Round(server_round, config.learning_rate_at(server_round)), time.monotonic()

    # 1. Sample a fraction of the connected nodes.
    online = nodes.roll_call(config.reply_timeout, new_timeout_s=config.query_timeout)
    sampled = sample(online, config, server_round)
    say(f"Sampled {len(sampled)} out of {len(online)} nodes.")

    # 2. TRAIN: they train the global model on their own data ...
    fedavg, losses = FedAvg(model.state), list[Weighted]()
    request = messages.TrainRequest(model.state, server_round, dataset, record.learning_rate)
    content = encode(request, model.arrays)
    for _, reply in nodes.ask(TRAIN, sampled, content, record.train, config.reply_timeout):
        fedavg.add(reply.model, reply.num_examples)
        losses.append(reply.loss)
    report_stage("📥", "TRAIN", record.train)

    # 3. ... and the server makes the next global model of the mean; it is evaluated meanwhile.
    if fedavg.num_states:
        model = GlobalModel(*server.step(config, model.state, fedavg.result(), model.memory))
    with ThreadPoolExecutor(max_workers=1) as pool:
        central = pool.submit(evaluate_centrally, server, model.state, record)

        # 4. QUERY every node: will you evaluate?
        content = encode(messages.QueryRequest(server_round))
        replies = nodes.ask(QUERY, online, content, record.query, config.query_timeout)
        volunteers = [node_id for node_id, reply in replies if reply.opt_in]
        record.num_opted_in = len(volunteers)

        # 5. EVALUATE: they evaluate the global model on their own validation split.
        order = messages.EvaluateRequest(model.state, server_round, dataset)
        content = encode(order, model.arrays)
        replies = nodes.ask(EVALUATE, volunteers, content, record.evaluate, config.reply_timeout)
        evaluations = [reply for _, reply in replies]
        central.result()
    report_stage("📨", "QUERY", record.query)
    say(f"✅ {len(volunteers)}/{len(online)} nodes opted-in for evaluation (QUERY)")
    explain_silence(server, record.query)
    report_stage("📥", "EVALUATE", record.evaluate)

    # 6. Mean and standard deviation over the nodes.
    summarise(record, losses, evaluations)
    record.model_sha256 = state_hash(model.state)
    record.seconds = time.monotonic() - began
    return model, record


def evaluate_centrally(server: Server, state: State, record: Round) -> None:
    """Evaluate the global model on the test split; checkpoint it if it is the best so far."""
    began = time.monotonic()
    model = make_model(server.dataset, torch.Generator())
    model.load_state_dict(state)
    evaluation = evaluate(model, load_test(server.dataset, server.device), server.device)
    loss, accuracy = evaluation.loss.mean, evaluation.accuracy
    record.centralized_loss, record.centralized_accuracy = finite(loss), accuracy
    record.centralized_seconds = time.monotonic() - began
    say(f"💡 Centrally evaluated model -> loss: {loss: .4f} /  accuracy: {accuracy: .4f}")
    if record.train.num_received and accuracy > server.directory.best_accuracy:
        say(f"🎉 New best global model found: {accuracy:.6f}")
        server.directory.save_checkpoint(record.server_round, accuracy, state)


def summarise(record: Round, losses: list[Weighted], evaluations: list[EvaluateReply]) -> None:
    """Fill in what the nodes' own numbers come to, and say it."""
    if record.train.num_received == 0:
        say("⚠️ No valid TRAIN reply: the global model stays as it was.")
    total = math.fsum(loss.sum for loss in losses)
    record.train_loss = finite(Weighted(total, sum(loss.weight for loss in losses)).mean)
    accuracies = mean_and_std(evaluation.accuracy for evaluation in evaluations)
    means = mean_and_std(evaluation.loss.mean for evaluation in evaluations)
    record.federated_evaluate_accuracy, record.federated_evaluate_accuracy_std = accuracies
    record.federated_evaluate_loss, record.federated_evaluate_loss_std = means
    if not evaluations:
        say("📊 Federated evaluation -> no node evaluated in this round")
        return
    say(
        f"📊 Federated evaluation -> loss: {means[0]:.3f}±{means[1]:.3f} / "
        f"accuracy: {accuracies[0]:.3f}±{accuracies[1]:.3f}"
    )


def report_stage(symbol: str, name: str, stage: Stage) -> None:
    """Say how many replies came, and what was wrong with the others."""
    say(f"{symbol} Received {stage.num_received}/{stage.num_sent} results ({name})")
    for problem in stage.problems:
        say(f"⚠️ {name}: {problem}")


def explain_silence(server: Server, query: Stage) -> None:
    """Say what to look at in the first round in which nobody answered QUERY."""
    stages = *(earlier["query"] for earlier in server.directory.results["rounds"]), vars(query)
    silent = [stage["num_missing"] == stage["num_sent"] for stage in stages]
    if silent[-1] and not any(silent[:-1]):
        say(
            f"⚠️ QUERY: nobody answered within {server.config.query_timeout:g} s; raise "
            f"query-timeout (a deployed node starts a process first), or compare the clocks"
        )


app = make_server_app()
