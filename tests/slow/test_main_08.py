"""The main exercise of notebook 08, one round: mistakes are named, right ways are accepted."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from course.checks import show_messages, six_steps
from course.checks.loop import fedlib_round
from solutions import solution

SOLUTION = solution("08", 1)
PRELUDE = """
import torch
from fedlib import *
from fedlib.messages import *
from fedlib.messages import encode
from fedlib.nodes import sample

def load(state):
    model = CNN(torch.Generator())
    model.load_state_dict(state)
    return model
"""

WRONG = [  # a piece of the solution, a mistake in its place, and a part of what is said
    ("sample(present, config, server_round)", "present", "Was a sample taken?"),
    ("nodes.roll_call(config.query_timeout)", "list(nodes.partitions)", "roll called?"),
    (
        "nodes.roll_call(config.query_timeout)",
        "sorted(nodes.partitions, key=nodes.partitions.get)",
        "comes in round 2",
    ),
    ("fedavg.add(reply.model, reply.num_examples)", "fedavg.add(reply.model, 1)", "weigh the same"),
    ("model = fedavg.result()", "fedavg.result()", "the model that went in?"),
    ("for _, reply in nodes.ask", "for _, reply in [] and nodes.ask", "before somebody takes its"),
    ("EvaluateRequest(model,", "EvaluateRequest(server.before,", "from before TRAIN?"),
    ('ask("query", present,', 'ask("query", sampled,', "Are only those asked that trained?"),
    ("in replies if reply.opt_in]", "in replies]", "every node that answers"),
    ('ask("evaluate", willing,', 'ask("evaluate", present,', "Did all of them say yes?"),
    ('ask("evaluate", willing,', 'ask("evaluate", sampled,', "also the volunteers?"),
    (
        "encode(QueryRequest(server_round)), config.query_timeout",
        "encode(QueryRequest(1)), 40.0",
        "expected 3, got 40",
    ),
    ("QueryRequest(server_round)", "QueryRequest(1)", "belong to this round?"),
    ("config.learning_rate_at(server_round)", "config.learning_rate", "learning-rate: expected"),
    ("content, record.query,", "content, record.train,", "this stage of the record"),
    ("evaluate(load(model),", "evaluate(load(server.before),", "Which model, on which test set?"),
    ("found.accuracy > directory", "found.accuracy >= directory", "better than all earlier ones?"),
    ("record.num_opted_in =", "record.num_opted_in = 1 +", "said yes in time?"),
    ("(reply.loss.mean for", "(reply.loss.sum for", "each counting once?"),
    ("state_hash(model)", "state_hash(server.before)", "The hash of which model"),
    ("save_round(record, model)", "save_round(record, server.before)", "saved with the record?"),
    ("    directory.save_round(record, model)\n", "", "How often is the round saved?"),
    (
        "    record.model_sha256 = state_hash(model)\n",
        "    directory.save_round(record, model)\n    record.model_sha256 = state_hash(model)\n",
        "How often is the round saved?",
    ),
    ("roll_call(config.query_timeout)", "roll_call(config.reply_timeout)", "expected 3, got 40"),
    ("nodes.roll_call(config.query_timeout)", "list(nodes.grid.get_node_ids())", "roll called?"),
    (
        "nodes.roll_call(config.query_timeout)",
        "sorted(nodes.grid.get_node_ids(), reverse=True)",
        "Whom does `sample` choose?",
    ),
    ("for _, reply in nodes.ask", "for _, reply in list(nodes.ask", "when it comes?"),
    (
        "fedavg.add(reply.model, reply.num_examples)",
        "vars(server).setdefault('kept', []).append(reply.model); "
        "fedavg.add(reply.model, reply.num_examples)",
        "still held when the third comes",
    ),
    ("model = fedavg.result()", "[t.add_(1.0) for t in model.values()]", "it changes its argument"),
    ("return model, record", "return model", "got 'dict'"),
    ("return model, record", "return None", "got 'NoneType'"),
    (
        "mean_and_std(reply.accuracy for reply in found)",
        "sum(reply.accuracy for reply in found) / len(found), 0.0",
        "accuracy_std: expected",
    ),
]

RIGHT = [  # the same, said otherwise
    ("roll_call(config.query_timeout)", "roll_call(timeout_s=config.query_timeout)"),
    (
        "roll_call(config.query_timeout)",
        "roll_call(config.reply_timeout, new_timeout_s=config.query_timeout)",
    ),
    ("fedavg = FedAvg(model)", "fedavg = FedAvg(dict(model))"),
    ("return model, record", "return [model, record]"),
    ("if found.accuracy > ", "if record.train.num_received and found.accuracy > "),
    ('ask("query", present,', "ask(QUERY, set(present),"),
]


def changed(old: str, new: str) -> Callable[..., Any]:
    """The folded solution with one piece exchanged."""
    assert SOLUTION.count(old) >= 1, old
    code = SOLUTION.replace(old, new)
    if new.startswith("for _, reply in list("):
        code = code.replace("record.train, seconds):", "record.train, seconds)):")
    names: dict[str, Any] = {}
    exec(PRELUDE + code, names)

    def my_round(server: Any, model: Any, server_round: int) -> Any:
        object.__setattr__(server, "before", model)
        return names["my_round"](server, model, server_round)

    return my_round


@pytest.mark.parametrize(("old", "new", "word"), WRONG, ids=lambda text: text[:40])
def test_a_mistake_is_named_in_one_line(
    old: str, new: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert six_steps(changed(old, new), otherwise=fedlib_round) is fedlib_round
    line, offer, use = capsys.readouterr().out.splitlines()
    assert line.startswith("❌") and word in line and len(line) < 300, line
    assert "show_messages" in offer and use.endswith("use ours.")


@pytest.mark.parametrize(("old", "new"), RIGHT, ids=lambda text: text[:40])
def test_a_right_round_may_look_otherwise(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = changed(old, new)
    assert six_steps(mine, otherwise=fedlib_round) is mine, capsys.readouterr().out


SAVE, HASH = (
    f"    {line}\n"
    for line in ("directory.save_round(record, model)", "record.model_sha256 = state_hash(model)")
)
EVALUATED = "    record.federated_evaluate_loss, record.federated_evaluate_loss_std = loss\n"


@pytest.mark.parametrize(
    ("lines", "field"), [((SAVE, HASH), "model_sha256"), ((SAVE, HASH, EVALUATED), "loss")]
)
def test_a_record_that_is_filled_after_it_was_saved_is_found(
    lines: tuple[str, ...], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = SOLUTION
    for line in lines:
        assert code.count(line) == 1
        code = code.replace(line, "")
    names: dict[str, Any] = {}
    exec(PRELUDE + code.replace("    return model", "".join(lines) + "    return model"), names)
    six_steps(names["my_round"], otherwise=fedlib_round)
    line = capsys.readouterr().out.splitlines()[0]
    assert f"{field} in results.json" in line and "after `save_round`?" in line, line


ASKING = """    for _, reply in nodes.ask("train", sampled, content, record.train, seconds):
        fedavg.add(reply.model, reply.num_examples)
"""
CALL = 'nodes.ask("train", sampled, content, record.train, seconds)'


@pytest.mark.parametrize(
    "other",
    [
        f"    [fedavg.add(r.model, r.num_examples) for _, r in {CALL}]\n",
        f"    replies = {CALL}\n    for pair in replies:\n"
        "        fedavg.add(pair[1].model, pair[1].num_examples)\n",
        f"    list(map(lambda p: fedavg.add(p[1].model, p[1].num_examples), {CALL}))\n",
        f"    for i, (node_id, r) in enumerate({CALL}):\n"
        "        state, n = r.model, r.num_examples\n        fedavg.add(state, n)\n",
    ],
)
def test_replies_may_be_added_in_any_way_that_keeps_none(
    other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SOLUTION.count(ASKING) == 1
    names: dict[str, Any] = {}
    exec(PRELUDE + SOLUTION.replace(ASKING, other), names)
    mine = names["my_round"]
    assert six_steps(mine, otherwise=fedlib_round) is mine, capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("mean_and_std(reply.accuracy for reply in found)", "(1 / len(found), 0.0)", "nobody says"),
        (
            "model = fedavg.result()",
            "model = fedavg.result() if fedavg.num_states else None",
            "TRAIN",
        ),
    ],
)
def test_what_a_bad_case_does_to_a_round_is_found(
    old: str, new: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "nobody says":
        new = "mean_and_std([r.accuracy for r in found]) if len(found) / len(found) else None"
    six_steps(changed(old, new), otherwise=fedlib_round)
    line = capsys.readouterr().out.splitlines()[0]
    assert re.search(rf"it raised \w+Error.*That was in: .*{case}", line), line


def test_an_untouched_stub_is_not_yet_and_shows_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    six_steps(lambda server, model, server_round: ..., otherwise=fedlib_round)
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["⏳ <l", "   T"]
    show_messages()
    assert capsys.readouterr().out.startswith("Nothing to show")
