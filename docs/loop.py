"""The whole loop in one file: fifty nodes train one model, in rounds of six steps.

``python docs/loop.py`` runs three rounds in Flower's simulation. Data, network, training and
generators are fedlib's; messages, both apps and the loop are here. one-file.md tells the rest.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import fedlib
from fedlib import SERVER, Stream
from fedlib.training import single_thread

NUM_ROUNDS, NUM_NODES, FRACTION, SEED = 3, 50, 0.2, 42
DATASET, TIMEOUT_S = "fashion-mnist", 120.0

# A node: notebooks 01 to 04.
client = ClientApp()


def unpack(message: Message, context: Context) -> Any:
    """Return a message's settings, the node's number and data, and the model that came."""
    records, here = dict[str, Any](message.content), dict[str, Any](context.node_config)
    who, of = here["partition-id"], here["num-partitions"]
    data = fedlib.load_partition(fedlib.open_dataset(DATASET), of, 1.0, SEED, who)
    model = fedlib.CNN(torch.Generator())
    if "model" in records:
        model.load_state_dict(records["model"].to_torch_state_dict())
    return records.get("config"), who, data, model


def answer(message: Message, **records: Any) -> Message:
    """Return a reply with these records."""
    return Message(RecordDict(records), reply_to=message)


@client.query("identify")
def handle_identify(message: Message, context: Context) -> Message:
    """Tell the server which partition this node holds."""
    who = context.node_config["partition-id"]
    return answer(message, config=ConfigRecord({"partition-id": who}))


@client.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train the global model on the node's own data."""
    config, who, data, model = unpack(message, context)
    generator = fedlib.torch_generator(SEED, config["server-round"], who, Stream.TRAIN)
    sgd: Any = {"batch_size": 32, "learning_rate": config["learning-rate"], "momentum": 0.9}
    with single_thread():
        fedlib.train(model, data.train, epochs=1, **sgd, generator=generator)
    metrics = MetricRecord({"num-examples": len(data.train)})
    return answer(message, model=ArrayRecord(model.state_dict()), metrics=metrics)


@client.query()
def handle_query(message: Message, context: Context) -> Message:
    """Toss a coin: will this node evaluate?"""
    config, who, _, _ = unpack(message, context)
    generator = fedlib.numpy_generator(SEED, config["server-round"], who, Stream.QUERY)
    return answer(message, config=ConfigRecord({"opt-in": bool(generator.random() < 0.5)}))


@client.evaluate()
def handle_evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on images that the node did not train on."""
    _, _, data, model = unpack(message, context)
    with single_thread():
        accuracy = fedlib.evaluate(model, data.validation).accuracy
    return answer(message, metrics=MetricRecord({"accuracy": accuracy}))


# The server: notebooks 05 to 08.
server = ServerApp()


def ask(grid: Grid, verb: str, node_ids: Sequence[int], **records: Any) -> dict[int, Any]:
    """Send each node these records; return what came back in time, by node, in their order."""
    content = RecordDict(records)
    messages = [Message(content, node_id, verb, ttl=TIMEOUT_S) for node_id in node_ids]
    came = {}
    for reply in grid.send_and_receive(messages, timeout=TIMEOUT_S):
        if reply.has_error():
            print(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
        else:
            came[reply.metadata.src_node_id] = reply.content
    return {node_id: came[node_id] for node_id in node_ids if node_id in came}


def weighted_mean(replies: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the mean of the models, in which each example has one vote."""
    total: dict[str, Any] = {}
    weights = [reply["metrics"]["num-examples"] for reply in replies]
    for reply, weight in zip(replies, weights, strict=True):
        for name, tensor in reply["model"].to_torch_state_dict().items():
            total[name] = total.get(name, 0) + weight * tensor.double()
    return {name: (tensor / sum(weights)).float() for name, tensor in total.items()}


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds."""
    test = fedlib.load_test(fedlib.open_dataset(DATASET))
    model = fedlib.CNN(fedlib.torch_generator(SEED, 0, SERVER, Stream.MODEL))
    while len(online := list(grid.get_node_ids())) < NUM_NODES:
        time.sleep(0.1)
    # Node ids are random and partitions are not: in their order, a seed samples the same ones.
    who = ask(grid, "query.identify", online)
    nodes = sorted(who, key=lambda node_id: who[node_id]["config"]["partition-id"])

    for server_round in range(1, NUM_ROUNDS + 1):
        # 1. Sample a fifth of the nodes.
        generator = fedlib.numpy_generator(SEED, server_round, SERVER, Stream.SAMPLE)
        chosen = generator.choice(len(nodes), round(FRACTION * len(nodes)), replace=False)
        sampled = [nodes[i] for i in sorted(chosen)]

        # 2. TRAIN: they train the global model on their own data.
        rate = 0.05 * 0.5 ** ((server_round - 1) / 5)
        config = ConfigRecord({"server-round": server_round, "learning-rate": rate})
        trained = ask(grid, "train", sampled, model=ArrayRecord(model.state_dict()), config=config)

        # 3. Aggregate what came, and evaluate the mean on the test set.
        if trained:
            model.load_state_dict(weighted_mean(list(trained.values())))
        with single_thread():
            accuracy = fedlib.evaluate(model, test).accuracy

        # 4. QUERY: ask every node whether it will evaluate.
        answers = ask(grid, "query", nodes, config=config)
        volunteers = [node_id for node_id, reply in answers.items() if reply["config"]["opt-in"]]

        # 5. EVALUATE: those that said yes evaluate the global model.
        reports = ask(grid, "evaluate", volunteers, model=ArrayRecord(model.state_dict()))

        # 6. Mean and spread of what they report.
        own = [reply["metrics"]["accuracy"] for reply in reports.values()]
        print(f"round {server_round}: {len(trained)} trained, central accuracy {accuracy:.4f};")
        print(f"  {len(own)} evaluated, accuracy {np.mean(own):.3f}±{np.std(own):.3f};")
        print(f"  model {fedlib.state_hash(model.state_dict())}")


if __name__ == "__main__":
    fedlib.simulate(server, client, NUM_NODES)
