"""The ServerApp: a ``for`` loop, and the six steps that make a round."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedlib import messages
from fedlib.aggregation import FedAvg
from fedlib.config import Config
from fedlib.console import say, tidy_flower_log
from fedlib.data import Split, load_test, open_dataset, partition_indices
from fedlib.errors import FedlibError, RunDirectoryError
from fedlib.federation import Federation, sample
from fedlib.model import CNN, State, clone_state, state_hash
from fedlib.prepare import find_source
from fedlib.randomness import SERVER, Stream, torch_generator
from fedlib.results import Round, RunDirectory, Stage, finite, mean_and_std
from fedlib.resume import expect_same_run, resume
from fedlib.tracking import tracking
from fedlib.training import Evaluation, Weighted, check_device, evaluate, single_thread

ROLL_CALL_TIMEOUT_S = 120.0
BEST_MODEL = "best model"


@dataclass(frozen=True)
class Server:
    """What stays the same from round to round.

    Attributes:
        config: The run's config.
        federation: The nodes.
        dataset: The data set's name, which every node is told.
        device: Where the global model is evaluated.
        test: The test split, on that device.
        directory: Where the run is written down.
        unsaved: What could not be written so far: how to write it, and why it failed.
        encoded: The model serialised last, and what came out.
    """

    config: Config
    federation: Federation
    dataset: str
    device: str
    test: Split
    directory: RunDirectory
    unsaved: dict[str, tuple[Callable[[], None], RunDirectoryError]] = field(default_factory=dict)
    encoded: list[tuple[State, ArrayRecord]] = field(default_factory=list)

    def encode(self, model: State) -> ArrayRecord:
        """Serialise a model once: EVALUATE and the next round's TRAIN send the same."""
        if not self.encoded or self.encoded[0][0] is not model:
            self.encoded[:] = [(model, messages.encode_model(model))]
        return self.encoded[0][1]


def make_server_app(config: Config | None = None) -> ServerApp:
    """Return the ServerApp.

    Args:
        config: The run's config; without one, it is read from ``context.run_config``, which
            ``flwr run`` fills and ``run_simulation`` leaves empty.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tidy_flower_log()
        try:
            run(grid, config or Config.from_run_config(context.run_config))
        except FedlibError as error:
            say(f"❌ {error}")
            raise

    return app


def run(grid: Grid, config: Config) -> State:
    """Train for ``config.num_server_rounds`` rounds and return the last global model.

    Raises:
        FedlibError: Something that a person can put right; what was written stays.
    """
    server, model, first_round = start(grid, config)
    with tracking(config.use_wandb, server.directory) as tracker:
        for server_round in range(first_round, config.num_server_rounds + 1):
            say(f"\n🔄 Starting round {server_round}/{config.num_server_rounds}")
            model, record = run_round(server, model, server_round)
            attempt(server, "results", partial(server.directory.save_round, record, model))
            tracker.log(record)
    for _, error in server.unsaved.values():
        raise error
    say(f"\n🏁 Finished; results in {server.directory.path}")
    return model


def start(grid: Grid, config: Config) -> tuple[Server, State, int]:
    """Check what can be checked before any training; return the model and the first round."""
    device = check_device(config.server_device)
    say(f"📦 Data set: {find_source(config.dataset)}")
    dataset = open_dataset(config.dataset)
    model: State = clone_state(CNN(torch_generator(config.seed, 0, SERVER, Stream.MODEL)))
    first_round = 1
    if config.resume_from:
        resumed = resume(config.resume_from, model)
        directory, model, first_round = resumed.directory, resumed.model, resumed.server_round + 1
    else:
        directory = RunDirectory.create(config)
    say(f"💾 Results go to {directory.path}")
    federation = Federation(grid)
    nodes = federation.roll_call(ROLL_CALL_TIMEOUT_S, wait_for_all=True)
    if len(nodes) < federation.num_partitions:
        say(f"⚠️ Only {len(nodes)} of {federation.num_partitions} nodes are there; going on.")
    if config.resume_from:
        expect_same_run(directory, config, dataset.name, federation.num_partitions)
        say(f"⏩ Going on after round {first_round - 1}")
    else:
        directory.describe(dataset.name, federation.num_partitions)
    partition_indices(dataset, federation.num_partitions, config.dirichlet_alpha, config.seed)
    test = load_test(dataset, device)
    server = Server(config, federation, dataset.name, device, test, directory)
    return server, model, first_round


def run_round(server: Server, model: State, server_round: int) -> tuple[State, Round]:
    """Run one round: a global model goes in, the next one and the round's record come out."""
    config, federation, began = server.config, server.federation, time.monotonic()
    record = Round(server_round, config.learning_rate_at(server_round))

    # 1. Sample a fraction of the connected nodes.
    nodes = federation.roll_call(config.query_timeout)
    sampled = sample(nodes, config, server_round)
    say(f"Sampled {len(sampled)} out of {len(nodes)} nodes.")

    # 2. TRAIN: they train the global model on their own data ...
    fedavg, losses = FedAvg(model), list[Weighted]()

    def aggregate(node_id: int, content: RecordDict) -> None:
        reply = messages.decode_train_reply(content)
        fedavg.add(reply.model, reply.num_examples)  # 3. ... and each reply joins the mean.
        losses.append(reply.loss)

    arrays, rate = server.encode(model), record.learning_rate
    request = messages.encode_train_request(arrays, server_round, server.dataset, rate)
    timeout_s = config.reply_timeout
    with single_thread():  # the clients are at work: threads would wait for each other
        record.train = federation.ask(messages.TRAIN, sampled, request, timeout_s, aggregate)
    report_stage("📥", "TRAIN", record.train)
    model = fedavg.result()

    with ThreadPoolExecutor(max_workers=1) as pool:
        central = pool.submit(evaluate_centrally, server, model, record)  # meanwhile
        # 4. QUERY every node: will you evaluate?
        volunteers: list[int] = []

        def note_opt_in(node_id: int, content: RecordDict) -> None:
            if messages.decode_query_reply(content):
                volunteers.append(node_id)

        request, limit_s = messages.encode_query_request(server_round), config.query_timeout
        record.query = federation.ask(
            messages.QUERY, nodes, request, limit_s, note_opt_in, late_is_normal=True
        )
        record.num_opted_in = len(volunteers)

        # 5. EVALUATE: they evaluate the global model on their own validation split.
        evaluations: list[Evaluation] = []

        def collect(node_id: int, content: RecordDict) -> None:
            evaluations.append(messages.decode_evaluate_reply(content))

        arrays = server.encode(model)
        request = messages.encode_evaluate_request(arrays, server_round, server.dataset)
        record.evaluate = federation.ask(messages.EVALUATE, volunteers, request, timeout_s, collect)
        central.result()
    report_stage("📨", "QUERY", record.query)
    say(f"✅ {len(volunteers)}/{len(nodes)} nodes opted-in for evaluation (QUERY)")
    report_stage("📥", "EVALUATE", record.evaluate)

    # 6. Mean and standard deviation over the nodes.
    summarise(record, losses, evaluations)
    record.model_sha256 = state_hash(model)
    record.seconds = time.monotonic() - began
    return model, record


def evaluate_centrally(server: Server, state: State, record: Round) -> None:
    """Evaluate the global model on the test split; checkpoint it if it is the best so far."""
    began = time.monotonic()
    model = CNN(torch.Generator())
    model.load_state_dict(state)
    evaluation = evaluate(model, server.test, server.device)
    loss, accuracy = evaluation.loss.mean, evaluation.accuracy
    record.centralized_loss, record.centralized_accuracy = finite(loss), accuracy
    record.centralized_seconds = time.monotonic() - began
    say(f"💡 Centrally evaluated model -> loss: {loss: .4f} /  accuracy: {accuracy: .4f}")
    if accuracy > server.directory.best_accuracy:
        say(f"🎉 New best global model found: {accuracy:.6f}")
        save = server.directory.save_checkpoint
        attempt(server, BEST_MODEL, partial(save, record.server_round, accuracy, state))
    elif BEST_MODEL in server.unsaved:  # an earlier one: perhaps there is space again
        attempt(server, BEST_MODEL, server.unsaved[BEST_MODEL][0])


def summarise(record: Round, losses: list[Weighted], evaluations: list[Evaluation]) -> None:
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


def attempt(server: Server, what: str, write: Callable[[], None]) -> None:
    """Write; where that fails, say so and remember it: the training goes on."""
    try:
        write()
        server.unsaved.pop(what, None)
    except RunDirectoryError as error:
        say(f"⚠️ {error}")
        server.unsaved[what] = (write, error)


app = make_server_app()
