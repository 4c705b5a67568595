"""What ``make_benchmark.py`` compares: the same federated training, written in three ways.

Each arm trains fedlib's CNN on the data set that is at hand, divided among fifty nodes: ten of
them train in a round, the global model is evaluated on the test set, every node is asked whether it
will evaluate, and those that say yes do. ``python benchmark_arms.py ARM ROUNDS`` runs one of them
and prints a line of JSON.

- ``bare``: a loop over tensors in one process, with as many threads as there are cores. No Flower:
  what the computing alone takes.
- ``app`` and ``app-delays``: fedlib through ``run_simulation``; nodes that answer a QUERY at once,
  and with the default delays.
- ``naive``: a ClientApp and a ServerApp as one writes them first: Flower Datasets' partitions with
  a transform an image, a ``DataLoader``, ``send_and_receive``, QUERY handlers that sleep.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor
from torch.utils.data import DataLoader

import fedlib
from fedlib.client_app import OPT_IN_PROBABILITY, TRACE
from fedlib.federation import sample
from fedlib.training import EVALUATION_BATCH_SIZE

NODES = int(os.environ.get("BENCHMARK_NODES", "50"))
SAMPLED = int(os.environ.get("BENCHMARK_SAMPLED", "10"))
CONFIG = fedlib.Config(
    use_wandb=False, query_max_delay=0.0, fraction_clients_train=min(1.0, SAMPLED / NODES)
)
BACKEND: Any = {"client_resources": {"num_cpus": 1}}


def bare(rounds: int) -> dict[str, Any]:
    """Run the loop without any messages."""
    torch.set_num_threads(os.cpu_count() or 1)
    dataset = fedlib.open_dataset(CONFIG.dataset)
    split = (dataset, NODES, CONFIG.dirichlet_alpha, CONFIG.seed)
    parts = [fedlib.load_partition(*split, node) for node in range(NODES)]
    test, model, out = fedlib.load_test(dataset), new_model(), []
    state = fedlib.clone_state(model)
    for server_round in range(1, rounds + 1):
        moments = [time.monotonic()]
        mean = {name: torch.zeros_like(value) for name, value in state.items()}
        chosen = sample(range(NODES), CONFIG, server_round)
        total = sum(len(parts[node].train) for node in chosen)
        for node in chosen:
            model.load_state_dict(state)
            bare_train(model, parts[node].train, server_round, node)
            for name, value in model.state_dict().items():
                mean[name] += value * (len(parts[node].train) / total)
        state = mean
        model.load_state_dict(state)
        moments.append(time.monotonic())
        accuracy = bare_evaluate(model, test)
        moments.append(time.monotonic())
        for node in range(NODES):
            rng = fedlib.numpy_generator(CONFIG.seed, server_round, node, fedlib.Stream.QUERY)
            if rng.random() < OPT_IN_PROBABILITY:
                bare_evaluate(model, parts[node].validation)
        moments.append(time.monotonic())
        stages = [later - earlier for earlier, later in pairwise(moments)]
        out.append(
            {
                "seconds": moments[-1] - moments[0],
                **dict(zip(("train", "central", "evaluate"), stages, strict=True)),
                "accuracy": accuracy,
            }
        )
    return {"rounds": out}


def bare_train(model: fedlib.CNN, split: fedlib.Split, server_round: int, node: int) -> None:
    """One local epoch: what PyTorch's tutorials do, on batches cut from one tensor."""
    generator = fedlib.torch_generator(CONFIG.seed, server_round, node, fedlib.Stream.TRAIN)
    rate = CONFIG.learning_rate_at(server_round)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=CONFIG.momentum)
    order = torch.randperm(len(split), generator=generator)
    images = split.normalize(fedlib.augment(split.images[order], generator))
    batches = zip(
        images.split(CONFIG.batch_size), split.labels[order].split(CONFIG.batch_size), strict=True
    )
    model.train()
    for batch, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()


@torch.inference_mode()
def bare_evaluate(model: fedlib.CNN, split: fedlib.Split) -> float:
    """Accuracy and loss on a split, batch by batch."""
    model.eval()
    loss, correct = 0.0, 0
    pairs = zip(
        split.images.split(EVALUATION_BATCH_SIZE),
        split.labels.split(EVALUATION_BATCH_SIZE),
        strict=True,
    )
    for images, labels in pairs:
        logits = model(split.normalize(images))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(dim=1) == labels).sum())
    return correct / len(split)


def app(rounds: int, delays: bool = False) -> dict[str, Any]:
    """Run fedlib itself."""
    folder = Path(tempfile.mkdtemp())
    os.environ[TRACE] = str(folder / "trace.jsonl")
    delay = fedlib.Config().query_max_delay if delays else 0.0
    config = replace(
        CONFIG, num_server_rounds=rounds, query_max_delay=delay, output_dir=str(folder)
    )
    called = time.time()
    run_simulation(
        fedlib.make_server_app(config),
        fedlib.make_client_app(config),
        NODES,
        backend_config=BACKEND,
    )
    trace = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    results = fedlib.load_results(next(folder.glob("*/*")))
    out = []
    for record in results["rounds"]:
        stages = {key: record[key]["seconds"] for key in ("train", "query", "evaluate")}
        central, accuracy = record["centralized_seconds"], record["centralized_accuracy"]
        out.append(
            {
                "seconds": record["seconds"],
                **stages,
                "central": central,
                "num_evaluated": record["evaluate"]["num_received"],
                "num_answered": record["query"]["num_received"],
                "accuracy": accuracy,
            }
        )
    first = min(line["ended"] for line in trace if line["message_type"] == MessageType.TRAIN)
    return {"rounds": out, "first_reply_s": first - called, "trace": trace}


def naive(rounds: int) -> dict[str, Any]:
    """Run the apps that one writes first."""
    out: list[dict[str, float]] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        model, nodes = new_model(), []
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
            total = sum(int(reply.content["metrics"]["num-examples"]) for reply in replies)
            mean: dict[str, Tensor] = {}
            for reply in replies:
                share = int(reply.content["metrics"]["num-examples"]) / total
                for name, value in reply.content["model"].to_torch_state_dict().items():
                    mean[name] = mean.get(name, 0) + value * share
            model.load_state_dict(mean)
            accuracy = naive_evaluate(model, naive_test())
            replies = list(naive_ask(grid, nodes, "query", None, rate, timeout=5.0))
            willing = [
                reply.metadata.src_node_id
                for reply in replies
                if reply.has_content() and reply.content["config"]["opt-in"]
            ]
            list(naive_ask(grid, willing, "evaluate", model, rate))
            out.append({"seconds": time.monotonic() - began, "accuracy": accuracy})

    run_simulation(server_app, naive_client_app(), NODES, backend_config=BACKEND)
    return {"rounds": out}


def naive_client_app() -> ClientApp:
    """Return the ClientApp that one writes first."""
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        model = naive_load(message)
        rate = float(message.content["config"]["learning-rate"])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=CONFIG.momentum)
        loader = naive_loaders(int(context.node_config["partition-id"]))[0]
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch["image"]), batch["label"]).backward()
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
        loader = naive_loaders(int(context.node_config["partition-id"]))[1]
        accuracy = naive_evaluate(naive_load(message), loader)
        return Message(RecordDict({"metrics": MetricRecord({"acc": accuracy})}), reply_to=message)

    return client_app


def naive_ask(
    grid: Grid,
    nodes: list[int],
    kind: str,
    model: fedlib.CNN | None,
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


def naive_load(message: Message) -> fedlib.CNN:
    """Return the model that a message carries."""
    model = new_model()
    model.load_state_dict(message.content["model"].to_torch_state_dict())
    return model


@lru_cache(maxsize=1)
def naive_dataset() -> Any:
    """Return the partitioned data set, once in each process."""
    return fedlib.federated_dataset(
        CONFIG.dataset, NODES, alpha=CONFIG.dirichlet_alpha, seed=CONFIG.seed
    )


def naive_loaders(partition_id: int) -> tuple[Any, Any]:
    """Return a node's loaders; every image is decoded and transformed whenever it is used."""
    divided = naive_dataset().load_partition(partition_id).train_test_split(0.2, seed=42)
    train = divided["train"].with_transform(naive_transform(augment=True))
    validation = divided["test"].with_transform(naive_transform())
    return DataLoader(train, CONFIG.batch_size, shuffle=True), DataLoader(validation, 32)


def naive_test() -> Any:
    """Return the test set's loader."""
    return DataLoader(naive_dataset().load_split("test").with_transform(naive_transform()), 32)


def naive_transform(augment: bool = False) -> Any:
    """Return what is done to each image of a batch."""
    from torchvision import transforms as t

    random = [t.RandomCrop(28, padding=4), t.RandomHorizontalFlip()] if augment else []
    change = t.Compose([*random, t.ToTensor(), t.Normalize((0.286,), (0.353,))])

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": [change(image) for image in batch["image"]], "label": batch["label"]}

    return apply


@torch.no_grad()
def naive_evaluate(model: fedlib.CNN, loader: Any) -> float:
    """Return the accuracy."""
    model.eval()
    correct = sum(
        int((model(batch["image"]).argmax(1) == batch["label"]).sum()) for batch in loader
    )
    return correct / len(loader.dataset)


def new_model() -> fedlib.CNN:
    """Return the first global model."""
    seed = (CONFIG.seed, 0, fedlib.SERVER, fedlib.Stream.MODEL)
    return fedlib.CNN(fedlib.torch_generator(*seed))


ARMS = {
    "bare": bare,
    "app": app,
    "app-delays": lambda rounds: app(rounds, delays=True),
    "naive": naive,
}


def main() -> None:
    """Run one arm; the line of JSON comes last."""
    arm, rounds = sys.argv[1], int(sys.argv[2])
    print(json.dumps(ARMS[arm](rounds)))


if __name__ == "__main__":
    # As a module of this name, the naive apps' caches live as long as the actor.
    import benchmark_arms

    benchmark_arms.main()
