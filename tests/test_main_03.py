"""The checks of notebook 03's message and reply: likely mistakes are named, other ways pass.

An answer is the folded solution with some of its text exchanged.
"""

from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from course import checks, ours
from fedlib import messages
from fedlib.client_app import seconds_left
from fedlib.errors import one_line
from solutions import changed, solution

NAMES = {
    **{kind.__name__: kind for kind in (Array, ArrayRecord, ConfigRecord, Error, Message)},
    **{kind.__name__: kind for kind in (MetricRecord, RecordDict)},
    **{"torch": torch, "messages": messages, "one_line": one_line, "seconds_left": seconds_left},
}
CHECKS = {"my_message": checks.message_to_train, "my_reply": checks.reply_to_train}
OURS = {"my_message": ours.train_message, "my_reply": ours.train_reply}
SOLUTIONS = {name: solution("03", number) for number, name in enumerate(CHECKS, 2)}
SENT = 'Message(content, dst_node_id=node_id, message_type="train", ttl=ttl_s)'
MODEL = '"model": ArrayRecord(state)'
RATE = 'config["learning-rate"]'
REPLY = "Message(content, reply_to=message)"
REFUSAL = "Message(Error(code=100, reason=one_line(error)), reply_to=message)"
TOLD = f'config["server-round"], config["dataset"], {RATE}'
BY_FEDLIB = """    content = messages.TrainRequest(state, server_round, dataset, learning_rate)
    return Message(messages.encode(content), node_id, "train", ttl=ttl_s)
"""
REPLY_BY_FEDLIB = """\
        content = messages.TrainReply(state, num_examples, loss.sum, loss.weight)
        return Message(messages.encode(content), reply_to=message)
"""
LATE = """        if seconds_left(message) <= 0:
            raise TimeoutError("the message had expired")
"""

WRONG: list[tuple[str, str, str, str]] = [  # which, what is exchanged for what, and what it hears
    ("my_message", f"return {SENT}", "return content", "expected 'Message', got 'RecordDict'"),
    ("my_message", "dst_node_id=node_id", "dst_node_id=9", "Is that written into the function?"),
    ("my_message", '"train"', '"query"', "expected 'train', got 'query'"),
    ("my_message", '"train"', '"trian"', "it raised ValueError"),
    ("my_message", ", ttl=ttl_s", "", "That is Flower's own."),
    ("my_message", "ttl=ttl_s", "ttl=600", "expected 30.5, got 600"),
    ("my_message", "ttl=ttl_s", "group_id=str(ttl_s)", "That is Flower's own."),
    ("my_message", '"config": ', '"settings": ', "the names of the records"),
    ("my_message", '"server-round"', '"server_round"', "What did the table call them?"),
    ("my_message", ', "dataset": dataset', "", "the keys of config"),
    (
        "my_message",
        '"server-round": server_round',
        '"server-round": float(server_round)',
        "the types in config",
    ),
    (
        "my_message",
        '"learning-rate": learning_rate',
        '"learning-rate": 0.05',
        "learning-rate: expected 0.25, got 0.05",
    ),
    (
        "my_message",
        '"dataset": dataset, "learning-rate": learning_rate',
        '"learning-rate": learning_rate, "dataset": "fashion-mnist"',
        "dataset: expected 'cifar10'",
    ),
    (
        "my_message",
        "ArrayRecord(state)",
        "ArrayRecord({k: v + 1 for k, v in state.items()})",
        "Which state shall travel?",
    ),
    (
        "my_message",
        "    settings = {",
        "    state.clear()\n    settings = {",
        "it changes its argument",
    ),
    ("my_reply", f"return {REPLY}", "return content", "expected 'Message', got 'RecordDict'"),
    (
        "my_reply",
        f"return {REPLY}",
        'return Message(content, message.metadata.src_node_id, "train", ttl=600)',
        "From what does a reply take",
    ),
    (
        "my_reply",
        TOLD,
        f'config["server-round"], {RATE}, config["dataset"]',
        "Which key is which argument?",
    ),
    ("my_reply", RATE, 'config["learning_rate"]', "Which of your lines raised that?"),
    ("my_reply", RATE, 'config.get("learning-rate", 0.05)', "Whose choice is a missing value?"),
    ("my_reply", ".to_torch_state_dict()", "", "expected a state dict with tensors"),
    ("my_reply", MODEL, '"model": message.content["model"]', "before or after the training?"),
    ("my_reply", "loss.sum", "loss.mean", "Is that a sum or a mean?"),
    ("my_reply", "loss.weight", "num_examples", "as many as there are images"),
    (
        "my_reply",
        '"num-examples": num_examples',
        '"num-examples": float(num_examples)',
        "the types in metrics",
    ),
    ("my_reply", "loss.sum", "loss", "an error: Not all values"),
    ("my_reply", '"metrics": ', '"result": ', "the names of the records"),
    ("my_reply", "MetricRecord(metrics)", "ConfigRecord(metrics)", "MetricRecord"),
    ("my_reply", LATE, "", "an expired message: it trained"),
    (
        "my_reply",
        '            raise TimeoutError("the message had expired")\n',
        "            return None\n",
        "an expired message: what it returns",
    ),
    (
        "my_reply",
        "except Exception",
        "except KeyError",
        "it raised RuntimeError: Error(s) in loading",
    ),
    ("my_reply", "one_line(error)", "str(error)", "What makes one line of several?"),
    ("my_reply", "one_line(error)", '"cannot use it"', "What did the exception say?"),
    ("my_reply", "one_line(error)", '""', "What shall the server read?"),
    ("my_reply", "code=100", "code=2", "Flower's own"),
    ("my_reply", REFUSAL, "Error(100, one_line(error))", "expected 'Message', got 'Error'"),
    ("my_reply", f"return {REFUSAL}", "pass", "How does the server hear of it?"),
]

RIGHT: list[tuple[str, str, str]] = [
    ("my_message", SENT, "Message(content, node_id, 'train', ttl=ttl_s)"),
    (
        "my_message",
        SENT,
        "Message(content, message_type='train', dst_node_id=node_id, ttl=ttl_s)",
    ),
    ("my_message", "ArrayRecord(state)", "ArrayRecord({k: Array(v) for k, v in state.items()})"),
    ("my_message", "RecordDict({", "RecordDict(records := {"),
    (
        "my_message",
        "    settings = {",
        f"{BY_FEDLIB}    settings = {{",
    ),
    (
        "my_reply",
        "train(state, *told)",
        "train(state=state, server_round=told[0], dataset=told[1], learning_rate=told[2])",
    ),
    (
        "my_reply",
        'raise TimeoutError("the message had expired")',
        'return Message(Error(100, "too late"), reply_to=message)',
    ),
    ("my_reply", "one_line(error)", '" ".join(f"{type(error).__name__}: {error}".split())'),
    ("my_reply", MODEL, '"model": ArrayRecord(torch_state_dict=state)'),
    (
        "my_reply",
        "        metrics = {",
        f"{REPLY_BY_FEDLIB}        metrics = {{",
    ),
]


def built(name: str, old: str, new: str) -> Any:
    names: dict[str, Any] = dict(NAMES)
    exec(changed(SOLUTIONS[name], {old: new}), names)
    return names[name]


def verdict(name: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    returned = CHECKS[name](answer, otherwise=OURS[name])
    line, *rest = capsys.readouterr().out.splitlines()
    assert returned is (answer if line[0] == "✅" else OURS[name])
    assert len(rest) <= 2 and rest[-1].startswith("   The cells below use ")
    return str(line)


@pytest.mark.parametrize("name, old, new, word", WRONG)
def test_a_likely_mistake_is_named(
    name: str, old: str, new: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(name, built(name, old, new), capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("name, old, new", RIGHT)
def test_a_right_answer_may_look_otherwise(
    name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, built(name, old, new), capsys) == f"✅ {name}: right."


@pytest.mark.parametrize("name", CHECKS)
def test_what_the_notebook_uses_in_place_of_a_wrong_answer_is_right(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, OURS[name], capsys).startswith("✅")


def test_the_messages_of_a_wrong_reply_can_be_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = list[Any]()
    monkeypatch.setattr("course.verdict.show", lambda figure, alt: shown.append(figure))
    verdict("my_reply", built("my_reply", "one_line(error)", "str(error)"), capsys)
    checks.show_messages()
    [figure] = shown
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said.count("error") == 5  # empty, without one of three keys, and of another shape
