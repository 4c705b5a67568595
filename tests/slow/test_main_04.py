"""The check of notebook 04's main exercise: right handlers pass, wrong ones hear their mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedlib
from course import checks
from fedlib import CNN, Config, Stream, messages
from fedlib.messages import TrainReply, TrainRequest

Handler = Callable[[Message, Context], Any]


def handler(**changes: Any) -> Handler:
    """The notebook's solution, with parts of it exchanged."""

    def my_train(message: Message, context: Context) -> Any:
        request = messages.decode(TrainRequest, message.content)
        config = Config.from_run_config(context.run_config)
        partition_id = context.node_config["partition-id"]
        dataset = fedlib.open_dataset(changes.get("dataset", request.dataset))
        seed = changes.get("data_seed", config.seed)
        place = (50, config.dirichlet_alpha, seed, partition_id)
        data = fedlib.load_partition(dataset, *place)
        split = data.validation if changes.get("split") else data.train
        model = CNN(torch.Generator())
        if changes.get("checked", True):
            fedlib.check_state(request.model, model.state_dict())
        model.load_state_dict(request.model, strict=changes.get("strict", True))
        options: dict[str, Any] = {
            "epochs": config.local_epochs,
            "batch_size": config.batch_size,
            "learning_rate": request.learning_rate,
            "momentum": config.momentum,
        }
        if "rate" in changes:
            options["learning_rate"] = config.learning_rate
        who = changes.get("who", lambda seed, r, p: (seed, r, p))(
            config.seed, request.server_round, partition_id
        )
        generator = fedlib.torch_generator(*who, Stream.TRAIN)
        generator = changes.get("generator", generator)
        loss = fedlib.train(
            model, split, generator=generator, **options | changes.get("options", {})
        )
        num_examples = changes.get("count", lambda data, loss: len(data.train))(data, loss)
        state = request.model if changes.get("untrained") else model.state_dict()
        loss_sum = loss.mean if changes.get("mean") else loss.sum
        reply = messages.encode(TrainReply(state, num_examples, loss_sum, loss.weight))
        if "end" in changes:
            return changes["end"](message, reply)
        return Message(reply, reply_to=message)

    return my_train


def careful(own: Handler) -> Handler:
    def answer(message: Message, context: Context) -> Any:
        try:
            return own(message, context)
        except fedlib.FedlibError as error:
            return Message(Error(100, str(error)), reply_to=message)

    return answer


def with_memory(own: Handler) -> Handler:
    """Its second training begins where the first ended."""

    def answer(message: Message, context: Context) -> Any:
        reply = own(message, context)
        node = message.metadata.dst_node_id
        if (node, 1) in kept and messages.decode(TrainRequest, message.content).server_round == 1:
            state = {k: v + 1e-3 for k, v in kept[node, 1].items()}
            reply.content["model"] = ArrayRecord(state)
        state = messages.decode(TrainReply, reply.content).model
        kept[node, messages.decode(TrainRequest, message.content).server_round] = state
        return reply

    kept: dict[Any, Any] = {}
    return answer


def writes_into(message: Message, reply: RecordDict) -> Message:
    message.content["model"] = reply["model"]
    return Message(reply, reply_to=message)


def a_number_by_hand(message: Message, reply: RecordDict) -> Message:
    """Keys written by hand: the same message."""
    content = RecordDict({"model": reply["model"], "metrics": reply["metrics"]})
    return Message(content=content, reply_to=message)


def remembers(own: Handler) -> Handler:
    def answer(message: Message, context: Context) -> Any:
        context.state["seen"] = MetricRecord({"messages": 1})
        return own(message, context)

    return answer


def in_an_app() -> ClientApp:
    app = ClientApp()
    app.train()(handler())
    return app


def verdict(answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    used = checks.handle_train(answer, otherwise=fedlib.make_client_app())
    line, which = capsys.readouterr().out.splitlines()
    assert which == f"   The cells below use {'yours' if used is answer else 'ours'}."
    return line


RIGHT = {
    "as in the notebook": handler(),
    "with a careful wrapper": careful(handler()),
    "built by hand": handler(end=a_number_by_hand),
    "an app": in_an_app(),
    "fedlib's own app": fedlib.make_client_app(),
}

WRONG: dict[str, tuple[Any, str]] = {
    "the record, not a message": (handler(end=lambda _, reply: reply), "hand back"),
    "no return": (handler(end=lambda *_: None), "hand back"),
    "to nobody": (handler(end=lambda _, r: Message(r, 1, "train", ttl=60)), "reply to this"),
    "no encoding": (
        handler(end=lambda m, r: Message(RecordDict({"m": r["model"]}), reply_to=m)),
        "Which dataclass",
    ),
    "an error": (handler(end=lambda m, _: Message(Error(1, "no"), reply_to=m)), "not be used"),
    "the config's rate": (handler(rate=True), "Which one did the server send"),
    "default options": (
        handler(options={"epochs": 1, "batch_size": 32, "momentum": 0.9}),
        "default options",
    ),
    "momentum": (handler(options={"momentum": 0.9}), "momentum is not"),
    "fixed epochs": (handler(options={"epochs": 2}), "epochs is not"),
    "a fixed batch size": (handler(options={"batch_size": 16}), "batch_size is not"),
    "a fixed seed": (handler(who=lambda s, r, p: (42, r, p)), "another seed"),
    "a fixed seed of the data": (handler(data_seed=42), "of the default seed"),
    "a written state": (remembers(handler()), "state was changed"),
    "round 1 for ever": (handler(who=lambda s, r, p: (s, 1, p)), "another round"),
    "the node's id": (handler(who=lambda s, r, p: (s, r, p + 2)), "the node's id"),
    "an unseeded generator": (handler(generator=torch.Generator()), "seed, round and partition"),
    "examples of all epochs": (handler(count=lambda _, loss: loss.weight), "more than once"),
    "the whole partition": (
        handler(count=lambda d, _: len(d.train) + len(d.validation)),
        "validation split trained on",
    ),
    "the validation split": (handler(split=True), "validation split"),
    "the model that came": (handler(untrained=True), "weights that came"),
    "a mean loss": (handler(mean=True), "That is the mean"),
    "a memory": (with_memory(handler()), "messages before"),
    "a changed message": (handler(end=writes_into), "was changed"),
    "no check": (handler(checked=False), "RuntimeError"),
    "no check, not strict": (handler(checked=False, strict=False), "as if all were well"),
    "its own data set": (handler(dataset="fashion-mnist"), "Whose data set"),
    "a missing key": (lambda message, context: context.node_config["id"], "it raised KeyError"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_handler_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(RIGHT[name], capsys).endswith("right.")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_handler_hears_its_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = WRONG[name]
    line = verdict(answer, capsys)
    assert line.startswith("❌")
    assert word in line
