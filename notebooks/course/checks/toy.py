"""Nodes for the checks: they speak fedlib's messages, compute next to nothing, and misbehave."""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlib import messages


def toy_app(faults: Mapping[int, str] | None = None) -> ClientApp:
    """Return a ClientApp whose answers can be computed by hand.

    Partition p has 10 (p + 1) examples. TRAIN adds p + 1 to every weight, with a loss of p + 1 an
    example. QUERY says yes where p is even. EVALUATE finds half of the examples classified
    correctly, and the same loss.

    Args:
        faults: What partitions do instead, whatever they are asked but their number: ``raises``;
            ``rubbish``, which is a record that nobody asked for; ``nan``, which is a model of NaN
            in reply to TRAIN.
    """
    app, wrong = ClientApp(), dict(faults or {})

    @app.train()
    @app.evaluate()
    @app.query()
    @app.query(messages.IDENTIFY_ACTION)
    def answer(message: Message, context: Context) -> Message:
        verb, place = message.metadata.message_type, context.node_config
        p, num_partitions = int(place["partition-id"]), int(place["num-partitions"])
        fault, n = wrong.get(p, ""), 10 * (p + 1)
        if verb == messages.IDENTIFY:
            return _reply(messages.Identity(p, num_partitions), message)
        if fault == "raises":
            raise ValueError("my disk is full")
        if fault == "rubbish":
            return Message(RecordDict({"rubbish": MetricRecord({"n": 1})}), reply_to=message)
        if verb == messages.QUERY:
            return _reply(messages.QueryReply(p % 2 == 0), message)
        if verb == messages.EVALUATE:
            return _reply(messages.EvaluateReply(n, float(n * (p + 1)), n // 2), message)
        model = messages.decode(messages.TrainRequest, message.content).model
        state = {k: tensor + (torch.nan if fault else p + 1) for k, tensor in model.items()}
        return _reply(messages.TrainReply(state, n, float(n * (p + 1)), n), message)

    return app


def _reply(content: Any, message: Message) -> Message:
    return Message(messages.encode(content), reply_to=message)
