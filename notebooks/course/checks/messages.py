"""Notebook 03: messages and records."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from course.draw import WatchedGrid
from course.ours import train_message
from course.verdict import Answer, check, expect, on_error, watch
from fedlib.client_app import REFUSED
from fedlib.local_grid import enter_local_run
from fedlib.model import State, state_hash
from fedlib.training import Weighted


@check
def label_histogram(answer: Answer) -> None:
    """A label histogram in a record."""
    content = counts = answer(torch.tensor([0, 2, 2, 7]))
    if content not in (None, ...):
        expect("the type of it all", type(content).__name__, "RecordDict", "What holds records?")
        expect("the names of the records", list(content), ["labels"])
        expect("the type of labels", type(content["labels"]).__name__, "MetricRecord")
        expect("the keys of labels", list(content["labels"]), ["counts"])
        counts = content["labels"]["counts"]
        kinds = sorted({type(count).__name__ for count in counts})
        expect("the types of the counts", kinds, ["int"], "Whole numbers, as Python has them?")
    expect("labels 0, 2, 2, 7", counts, [1, 0, 2, 0, 0, 0, 0, 1, 0, 0], "A place for each class?")


@check
def record_bytes(answer: Answer) -> None:
    """The bytes of an ArrayRecord, predicted."""
    for shapes, itemsize, wanted in (
        ({"weight": (3, 5)}, 4, 6 + 128 + 60),
        ({"weight": (3, 5), "bias": (3,)}, 2, 6 + 128 + 30 + 4 + 128 + 6),
        ({"conv": (8, 3, 5, 5)}, 4, 4 + 128 + 2400),
        ({"scale": ()}, 8, 5 + 128 + 8),
    ):
        names, arrays = sum(map(len, shapes)), len(shapes)
        numbers = sum(math.prod(shape) for shape in shapes.values())
        slips = {
            "What of the names?": wanted - names,
            "How many headers are there?": wanted - 128 * (arrays - 1 or arrays),
            "How many bytes has each number here?": wanted + (4 - itemsize) * numbers or wanted + 1,
        }
        hint = "How many numbers has such a shape?"
        got = answer(shapes, itemsize)
        expect(f"{shapes}, {itemsize} bytes a number", got, wanted, hint, slips)


# --- the main exercise: a message and its reply

STATE: dict[str, Tensor] = {"weight": torch.tensor([[0.5, -1.5]]), "bias": torch.tensor([0.1])}
OTHER: dict[str, Tensor] = {"weight": torch.tensor([[0.5, -1.5, 2.0]])}
RATE = 0.25
METRICS = {"num-examples": 12, "loss-sum": 30.0, "loss-weight": 24}
HALVES = {"model": "ArrayRecord", "config": "ConfigRecord", "metrics": "MetricRecord"}


@check
def message_to_train(answer: Answer) -> None:
    """The message that asks a node to train."""
    enter_local_run()
    for state, server_round, dataset, rate, node_id, ttl_s in (
        (STATE, 3, "fashion-mnist", RATE, 9, 600),
        (OTHER, 4, "cifar10", 0.05, 12, 30.5),
    ):
        question = f"round {server_round} for node {node_id}"
        got = answer(dict(state), server_round, dataset, rate, node_id, ttl_s)
        came = got if got is None or got is ... else type(got).__name__
        expect(f"{question}: what it returns", came, "Message", "What has an address?")
        hint = "Who shall get it? Is that written into the function?"
        expect(f"{question}: dst_node_id", str(got.metadata.dst_node_id), str(node_id), hint)
        hint = "Which function of the node shall run?"
        expect(f"{question}: message_type", got.metadata.message_type, "train", hint)
        slips = {"That is Flower's own. Who says how long this one may live?": 43200}
        expect(f"{question}: ttl", got.metadata.ttl, ttl_s, "How long may it live?", slips)
        config = {"server-round": server_round, "dataset": dataset, "learning-rate": rate}
        _expect_content(question, got.content, state, "config", config)


@check
def reply_to_train(answer: Answer) -> None:
    """The reply to such a message, whatever it holds."""
    told, replies = list[tuple[Any, ...]](), list[Any]()

    def train(state: State, server_round: int, dataset: str, learning_rate: float) -> Answer:
        told.append((state, server_round, dataset, learning_rate))
        if not all(isinstance(state[key], Tensor) for key in state):
            raise TypeError(f"expected a state dict with tensors, got a {type(state).__name__}")
        if _shapes(state) != _shapes(STATE):
            raise RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch for weight\n")
        return _trained(state), METRICS["num-examples"], Weighted(30.0, 24)

    app = ClientApp()

    @app.train()
    def handler(message: Message, context: Context) -> Any:
        try:
            replies.append(answer(message, train))
        except Exception as error:
            replies.append(error)
            raise
        return replies[-1]

    grid = WatchedGrid(app, 1)

    def ask(message: Message) -> tuple[str, Any]:
        """Send the node a message; return its id, and what the answer made of it."""
        told.clear()
        [message_id] = grid.push_messages([message])
        list(grid.pull_messages([message_id]))
        if isinstance(replies[-1], Exception):
            raise replies[-1]
        return message_id, replies[-1]

    question = "a good message"
    message_id, reply = ask(_good())
    came = reply if reply is None or reply is ... else type(reply).__name__
    expect(f"{question}: what it returns", came, "Message", "What has an address?")
    watch(grid)
    holds = f"an error: {reply.error.reason}" if reply.has_error() else "content"
    expect(f"{question}: its reply holds", holds, "content", "Which of your lines raised that?")
    expect(f"{question}: how often it trained", len(told), 1, "How often shall it?")
    config = {"server-round": 3, "dataset": "fashion-mnist", "learning-rate": RATE}
    given = dict(zip(config, told[0][1:], strict=True))
    expect(f"{question}: what train was told", given, config, "Which key is which argument?")
    hint = "In which record does the model come?"
    expect(f"{question}: the state that train got", _hash(told[0][0]), _hash(STATE), hint)
    _expect_addressed(question, message_id, reply)
    _expect_content(question, reply.content, _trained(STATE), "metrics", METRICS)

    def without(key: str) -> tuple[str, Message, str, str]:
        message = _good()
        del message.content["config"][key]
        return f"no {key} in it", message, key, "Whose choice is a missing value?"

    for question, message, word, hint in (
        ("an empty message", Message(RecordDict(), 2, "train", ttl=600), "", ""),
        without("learning-rate"),
        without("server-round"),
        without("dataset"),
        ("a model of another shape", _good(OTHER), "size mismatch", "Who finds that out?"),
        ("an expired message", _good(expired=True), "", "Who awaits the reply?"),
    ):
        with on_error(Exception, f"This was {question}. How does the server hear of it?"):
            message_id, reply = ask(message)
        trained_late = bool(told) and question == "an expired message"
        expect(f"{question}: it trained", trained_late, False, hint)
        came = type(reply).__name__
        expect(f"{question}: what it returns", came, "Message", "How does the server hear of it?")
        expect(f"{question}: the reply has an error", reply.has_error(), True, hint)
        hint = "Which codes are Flower's own?"
        expect(f"{question}: the code of the error", str(reply.error.code), str(REFUSED), hint)
        reason = reply.error.reason or ""
        hint = "What makes one line of several?" if reason else "What shall the server read?"
        expect(f"{question}: lines in its reason", str(len(reason.splitlines())), "1", hint)
        hint = f"It says {reason!r}. What did the exception say?"
        expect(f"{question}: the reason says why", word in reason, True, hint)
        _expect_addressed(question, message_id, reply)


def _good(state: State = STATE, *, expired: bool = False) -> Message:
    message = train_message(state, 3, "fashion-mnist", RATE, node_id=2, ttl_s=600)
    message.metadata.created_at -= 3600 * expired
    return message


def _trained(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _hash(state: State) -> str:
    return state_hash(state)[:12]


def _expect_addressed(question: str, message_id: str, reply: Message) -> None:
    hint = "From what does a reply take its address?"
    to = reply.metadata.reply_to_message_id
    expect(f"{question}: reply_to_message_id of its reply", to, message_id, hint)


def _expect_content(
    question: str, content: RecordDict, state: State, name: str, values: Mapping[str, Any]
) -> None:
    """Expect a model, and beside it one record of numbers and texts."""
    hint = "What did the table call them?"
    expect(f"{question}: the names of the records", sorted(content), sorted(["model", name]), hint)
    kinds = {record: type(content[record]).__name__ for record in ("model", name)}
    hint = "Which record holds arrays, which numbers, and which settings?"
    expect(f"{question}: the types of the records", kinds, {k: HALVES[k] for k in kinds}, hint)
    record: Any = content[name]
    hint = "What did the table call them?"
    expect(f"{question}: the keys of {name}", sorted(record), sorted(values), hint)
    kinds = {key: type(record[key]).__name__ for key in values}
    wanted = {key: type(value).__name__ for key, value in values.items()}
    expect(f"{question}: the types in {name}", kinds, wanted, "What did the table say?")
    slips = {
        "Is that a sum or a mean?": {**values, "loss-sum": 1.25},
        "How many images were there, and over how many is the loss?": {
            **values,
            "num-examples": 24,
            "loss-weight": 12,
        },
        "Is the loss over as many as there are images?": {**values, "loss-weight": 12},
    }
    expect(f"{question}: {name}", dict(record), values, "Where does each value come from?", slips)
    model: Any = content["model"]
    hashes = {"Was that before or after the training?": _hash(STATE)}
    came = _hash(model.to_torch_state_dict())
    expect(f"{question}: the model", came, _hash(state), "Which state shall travel?", hashes)
