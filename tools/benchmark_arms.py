"""What ``benchmark.py`` compares: the same federated training, written in three ways.

Each arm trains fedlib's CNN on Fashion-MNIST, divided among fifty nodes: ten of them train in a
round, the global model is evaluated on the test set, every node is asked whether it will evaluate,
and those that say yes do. ``python tools/benchmark_arms.py ARM ROUNDS`` runs one of them and prints
a line of JSON.

- ``bare``: fedlib's ``train`` and ``evaluate`` in a loop in one process, with as many threads as
  there are cores. No Flower: what the computing alone takes. On a GPU, model, data and mean stay
  there.
- ``app`` and ``app-delays``: fedlib in Flower's simulation; nodes that answer a QUERY at once, and
  with the default delays.
- ``local``: fedlib on a LocalGrid, all in one process.
- ``naive``: a ClientApp and a ServerApp as one writes them first: Flower Datasets' partitions with
  a transform an image, a ``DataLoader``, ``send_and_receive``, QUERY handlers that sleep.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

import fedlib
from fedlib.client_app import OPT_IN_PROBABILITY, TRACE
from fedlib.nodes import sample

NODES = int(os.environ.get("BENCHMARK_NODES", "50"))
SAMPLED = int(os.environ.get("BENCHMARK_SAMPLED", "10"))
CONFIG = fedlib.Config(
    use_wandb=False, query_max_delay=0.0, fraction_clients_train=min(1.0, SAMPLED / NODES)
)
SHARE = float(os.environ.get("BENCHMARK_GPU_SHARE", "0"))
"""Of a GPU, for each client process; with 0, everything is computed on the CPU."""
DEVICE = "cuda" if SHARE else "cpu"


def bare(rounds: int) -> dict[str, Any]:
    """Run the loop without any messages."""
    torch.set_num_threads(os.cpu_count() or 1)
    dataset = fedlib.open_dataset(CONFIG.dataset)
    split = (dataset, NODES, CONFIG.dirichlet_alpha, CONFIG.seed)
    parts = [fedlib.load_partition(*split, node, DEVICE) for node in range(NODES)]
    test, model, out = fedlib.load_test(dataset, DEVICE), new_model().to(DEVICE), []
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for server_round in range(1, rounds + 1):
        moments, mean = [time.monotonic()], fedlib.FedAvg(state)
        for node in sample(range(NODES), CONFIG, server_round):
            model.load_state_dict(state)
            fedlib.train(
                model,
                parts[node].train,
                epochs=CONFIG.local_epochs,
                batch_size=CONFIG.batch_size,
                learning_rate=CONFIG.learning_rate_at(server_round),
                momentum=CONFIG.momentum,
                generator=fedlib.torch_generator(
                    CONFIG.seed, server_round, node, fedlib.Stream.TRAIN
                ),
                device=DEVICE,
            )
            mean.add(model.state_dict(), len(parts[node].train))
        state = mean.result()
        model.load_state_dict(state)
        moments.append(time.monotonic())
        accuracy = fedlib.evaluate(model, test, DEVICE).accuracy
        moments.append(time.monotonic())
        for node in range(NODES):
            rng = fedlib.numpy_generator(CONFIG.seed, server_round, node, fedlib.Stream.QUERY)
            if rng.random() < OPT_IN_PROBABILITY:
                fedlib.evaluate(model, parts[node].validation, DEVICE)
        moments.append(time.monotonic())
        stages = [later - earlier for earlier, later in pairwise(moments)]
        named = dict(zip(("train", "central", "evaluate"), stages, strict=True))
        out.append({"seconds": moments[-1] - moments[0], **named, "accuracy": accuracy})
    return {"rounds": out}


def app(rounds: int, delays: bool = False, local: bool = False) -> dict[str, Any]:
    """Run fedlib itself, on the simulation engine or a LocalGrid."""
    folder = Path(tempfile.mkdtemp())
    os.environ[TRACE] = str(folder / "trace.jsonl")
    delay = fedlib.Config().query_max_delay if delays else 0.0
    config = replace(
        CONFIG, num_server_rounds=rounds, query_max_delay=delay, output_dir=str(folder)
    )
    server_app, client_app = fedlib.make_server_app(config), fedlib.make_client_app(config)
    if local:
        fedlib.run(fedlib.LocalGrid(client_app, NODES), config)
    else:
        resources = fedlib.BACKEND["client_resources"] | {"num_gpus": SHARE}
        backend = fedlib.BACKEND | {"client_resources": resources}
        fedlib.simulate(server_app, client_app, NODES, backend)
    memory = psutil.Process().memory_info().rss
    lines = (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines()
    trace = [json.loads(line) for line in lines]
    out = []
    for record in fedlib.load_results(next(folder.glob("*/*")))["rounds"]:
        found = {key: record[key]["seconds"] for key in ("train", "query", "evaluate")}
        found |= {"seconds": record["seconds"], "central": record["centralized_seconds"]}
        found["num_evaluated"] = record["evaluate"]["num_received"]
        found["num_answered"] = record["query"]["num_received"]
        out.append({**found, "accuracy": record["centralized_accuracy"]})
    return {"rounds": out, "busy": busy(trace), "server_bytes": memory}


def busy(trace: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean seconds that a handler takes, without each process's first message."""
    seconds, seen = defaultdict[str, list[float]](list), set[tuple[str, int]]()
    for line in trace:
        kind = line["message_type"], line["process"]
        if kind in seen:
            seconds[kind[0]].append(line["ended"] - line["began"])
        seen.add(kind)
    return {kind: statistics.fmean(values) for kind, values in seconds.items()}


def naive(rounds: int) -> dict[str, Any]:
    """Run the apps that one writes first."""
    out: list[dict[str, float]] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        model, nodes = new_model(), list[int]()
        while len(nodes) < NODES:
            nodes = sorted(grid.get_node_ids())
            time.sleep(0.1)
        rng = np.random.default_rng(CONFIG.seed)
        for server_round in range(1, rounds + 1):
            began = time.monotonic()
            rate = CONFIG.learning_rate_at(server_round)
            # Node ids are too large for NumPy's integers: choose positions.
            chosen = [nodes[k] for k in rng.choice(len(nodes), SAMPLED, replace=False)]
            replies = list(naive_ask(grid, chosen, "train", model, rate))
            total = sum(naive_examples(reply) for reply in replies)
            mean: dict[str, Tensor] = {}
            for reply in replies:
                for name, value in naive_arrays(reply).items():
                    mean[name] = mean.get(name, 0) + value * (naive_examples(reply) / total)
            model.load_state_dict(mean)
            accuracy = naive_evaluate(model, naive_test())
            replies = list(naive_ask(grid, nodes, "query", None, rate, timeout=5.0))
            willing = [
                reply.metadata.src_node_id
                for reply in replies
                if reply.has_content() and reply.content.config_records["config"]["opt-in"]
            ]
            list(naive_ask(grid, willing, "evaluate", model, rate))
            out.append({"seconds": time.monotonic() - began, "accuracy": accuracy})

    fedlib.simulate(server_app, naive_client_app(), NODES)
    return {"rounds": out}


def naive_client_app() -> ClientApp:
    """Return the ClientApp that one writes first."""
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        model = new_model()
        model.load_state_dict(naive_arrays(message))
        rate: Any = message.content.config_records["config"]["learning-rate"]
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=CONFIG.momentum)
        loader = naive_loaders(context)[0]
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch["image"]), batch["label"]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(loader.dataset)})
        content = RecordDict({"model": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @client_app.query()
    def query(message: Message, context: Context) -> Message:
        rng = np.random.default_rng()
        time.sleep(rng.uniform(0, 2))
        content = RecordDict({"config": ConfigRecord({"opt-in": bool(rng.random() < 0.5)})})
        return Message(content, reply_to=message)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = new_model()
        model.load_state_dict(naive_arrays(message))
        accuracy = naive_evaluate(model, naive_loaders(context)[1])
        return Message(RecordDict({"metrics": MetricRecord({"acc": accuracy})}), reply_to=message)

    return client_app


def naive_ask(
    grid: Grid,
    nodes: list[int],
    kind: str,
    model: nn.Module | None,
    rate: float,
    timeout: float | None = None,
) -> Iterable[Message]:
    """Send each node a message of its own, and wait."""
    outgoing = []
    for node in nodes:
        content = RecordDict({"config": ConfigRecord({"learning-rate": rate})})
        if model is not None:
            content["model"] = ArrayRecord(model.state_dict())
        outgoing.append(Message(content, node, kind))
    return grid.send_and_receive(outgoing, timeout=timeout)


def naive_arrays(message: Message) -> dict[str, Tensor]:
    """Return the state that a message carries."""
    return message.content.array_records["model"].to_torch_state_dict()


def naive_examples(message: Message) -> int:
    """Return the number of examples that a reply tells."""
    number: Any = message.content.metric_records["metrics"]["num-examples"]
    return int(number)


@lru_cache(maxsize=1)
def naive_dataset() -> Any:
    """Return the partitioned data set, once in each process."""
    return federated_dataset(CONFIG, NODES)


def federated_dataset(config: fedlib.Config, nodes: int) -> FederatedDataset:
    """Return the data set as Flower Datasets divides it; fedlib's partitions are the same."""
    partitioner = DirichletPartitioner(
        nodes, "label", config.dirichlet_alpha, 10, self_balancing=False, seed=config.seed
    )
    source = fedlib.find_source(config.dataset).path
    return FederatedDataset(dataset=source, partitioners={"train": partitioner}, seed=42)


def naive_loaders(context: Context) -> tuple[Any, Any]:
    """Return a node's loaders; every image is decoded and transformed whenever it is used."""
    partition = naive_dataset().load_partition(context.node_config["partition-id"])
    divided = partition.train_test_split(0.2, seed=42)
    train = divided["train"].with_transform(naive_transform(augment=True))
    validation = divided["test"].with_transform(naive_transform())
    return DataLoader(train, CONFIG.batch_size, shuffle=True), DataLoader(validation, 32)


def naive_test() -> Any:
    """Return the test set's loader."""
    return DataLoader(naive_dataset().load_split("test").with_transform(naive_transform()), 32)


def naive_transform(augment: bool = False) -> Any:
    """Return what is done to each image of a batch."""
    t = transforms
    random = [t.RandomCrop(28, padding=4), t.RandomHorizontalFlip()] if augment else []
    change = t.Compose([*random, t.ToTensor(), t.Normalize((0.286,), (0.353,))])

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": [change(image) for image in batch["image"]], "label": batch["label"]}

    return apply


@torch.no_grad()
def naive_evaluate(model: nn.Module, loader: Any) -> float:
    """Return the accuracy."""
    model.eval()
    correct = sum(
        int((model(batch["image"]).argmax(1) == batch["label"]).sum()) for batch in loader
    )
    return correct / len(loader.dataset)


def new_model() -> nn.Module:
    """Return the first global model."""
    seed = (CONFIG.seed, 0, fedlib.SERVER, fedlib.Stream.MODEL)
    return fedlib.CNN(fedlib.torch_generator(*seed))


def main() -> None:
    """Run one arm; the line of JSON comes last."""
    arms = {"bare": bare, "app": app, "naive": naive}
    arms |= {"app-delays": partial(app, delays=True), "local": partial(app, local=True)}
    arm, rounds = sys.argv[1], int(sys.argv[2])
    print(json.dumps(arms[arm](rounds)))


if __name__ == "__main__":
    # As a module of this name, the naive apps' caches live as long as the actor.
    import benchmark_arms

    benchmark_arms.main()
