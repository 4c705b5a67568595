"""The main exercises of 05 and 07: right loops pass, and each wrong one hears why.

A wrong loop is the folded solution with one thing changed, as a learner might have it.
"""

import math
import time
from typing import Any

import pytest
from flwr.app import Message

import fedlib
from course import checks, ours
from course.checks.waiting import WaitingRoom
from fedlib.messages import QueryReply, QueryRequest, decode, encode
from fedlib.nodes import sample
from solutions import changed, solution

Answer = Any
NAMES = {
    "time": time,
    "fedlib": fedlib,
    "Message": Message,
    "sample": sample,
    "encode": encode,
    "decode": decode,
    "QueryRequest": QueryRequest,
    "ReplyError": fedlib.ReplyError,
    "QueryReply": QueryReply,
}


ROUND, QUERY = solution("05", 1), solution("07", 3)


def verdict(check: Answer, code: str, capsys: pytest.CaptureFixture[str]) -> str:
    names: dict[str, Any] = dict(NAMES)
    exec(code, names)
    [function] = (value for name, value in names.items() if name.startswith("my_"))
    capsys.readouterr()
    check(function)
    return capsys.readouterr().out.splitlines()[0]


LOOP = "while waiting and time.monotonic() < began + timeout_s:"
BY_MESSAGE = "node_id = waiting.pop(reply.metadata.reply_to_message_id)"
BY_SENDER = "node_id = reply.metadata.src_node_id"
ERROR = "        if reply.has_error():\n"
RESTS = "        time.sleep(0.02)\n"
WRONG_ROUNDS: list[tuple[dict[str, str], str]] = [
    ({"sample(nodes, config, server_round)": "list(nodes)"}, "which nodes were asked"),
    ({"sample(nodes, config, server_round)": "sample(nodes, config, 1)"}, "which nodes were asked"),
    (
        {"sample(nodes, config, server_round)": "sample(nodes, fedlib.Config(), server_round)"},
        "Which nodes, config and round were given?",
    ),
    (
        {"sample(nodes,": "sample(sorted(grid.get_node_ids()),"},
        "Which nodes, config and round were given?",
    ),
    ({'"train"': '"query"'}, "the messages' type"),
    ({", ttl=timeout_s": ""}, "expected 60, got 43200"),
    ({LOOP: "while waiting:"}, "What ends the loop, if a node never answers?"),
    ({LOOP: LOOP.replace("waiting and ", "")}, "What is it still waiting for?"),
    ({LOOP: "for _ in range(3):"}, "Who is left out?"),
    ({LOOP: LOOP.replace("began", "time.monotonic()")}, "What ends the loop"),
    ({RESTS: ""}, "expected 'at most 300 times a second', got '10"),
    ({RESTS: RESTS.replace("0.02", "0.001")}, "Does it rest between two looks"),
    ({RESTS: RESTS.replace("0.02", "1")}, "expected 'at most 0.1 s', got '1 s'"),
    ({RESTS: RESTS.replace("0.02", "timeout_s")}, "Who waits for it meanwhile?"),
    ({"reply.has_error()": "False"}, "Is an Error a result?"),
    ({ERROR: ERROR + "                return replies, errors, set()\n"}, "Until when does it"),
    ({"errors[node_id] = reply.error.reason": "pass"}, "Who answered with an Error?"),
    ({"= reply.error.reason": "= reply.error"}, "expected 'str', got 'Error'"),
    ({"= reply.error.reason": "= f'error {reply.error.code}'"}, "expected 'my disk is full', got"),
    ({LOOP: LOOP.replace("waiting", "len(replies) < len(chosen)")}, "Who else has answered?"),
    (
        {LOOP: LOOP.replace("waiting", "replies.keys() | errors.keys() != set(chosen)")}
        | {"set(waiting.values())": "set(chosen) - set(replies) - set(errors)"}
        | {BY_MESSAGE: BY_SENDER},
        "Which message does it answer?",
    ),
    ({BY_MESSAGE: f"{BY_MESSAGE}\n            {BY_SENDER}"}, "Which message does it answer?"),
    (
        {"set(waiting.values())": "set(chosen) - set(replies)"},
        "Is a node silent that answers with an error?",
    ),
    ({"set(waiting.values())": "set(waiting)"}, "Who owes an answer at the end?"),
    ({"(time.monotonic() - began, reply)": "reply"}, "expected '(seconds, Message)'"),
    (
        {"(time.monotonic() - began, reply)": "(reply, time.monotonic())"},
        "got '(Message, float)'",
    ),
    ({"time.monotonic() - began, reply": "time.time(), reply"}, "Seconds since the push"),
    ({"return replies, errors, set(waiting.values())": "return replies"}, "how many values"),
    ({"return replies, errors, set(waiting.values())": "pass"}, "A `return`?"),
]

ONE_BY_ONE = """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    replies, errors, silent, began = {}, {}, set(), time.monotonic()
    for n in sample(nodes, config, server_round):
        message = Message(content, n, "train", ttl=timeout_s)
        for reply in grid.send_and_receive([message], timeout=timeout_s):
            replies[n] = (time.monotonic() - began, reply)
    return replies, errors, silent
"""
ALL_AT_THE_END = """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    chosen, began = sample(nodes, config, server_round), time.monotonic()
    messages = [Message(content, n, "train", ttl=timeout_s) for n in chosen]
    came = list(grid.send_and_receive(messages, timeout=timeout_s))
    seconds = time.monotonic() - began
    replies = {r.metadata.src_node_id: (seconds, r) for r in came if not r.has_error()}
    errors = {r.metadata.src_node_id: r.error.reason for r in came if r.has_error()}
    return replies, errors, set(chosen) - set(replies) - set(errors)
"""
WITH_A_MEMORY = """
waiting = {}

def my_round(grid, nodes, config, server_round, content, timeout_s):
    began, replies, errors = time.monotonic(), {}, {}
    for n in sample(nodes, config, server_round):
        [i] = grid.push_messages([Message(content, n, "train", ttl=timeout_s)])
        waiting[i] = n
    while waiting and time.monotonic() < began + timeout_s:
        for r in grid.pull_messages(list(waiting)):
            n = waiting.pop(r.metadata.reply_to_message_id)
            if r.has_error():
                errors[n] = r.error.reason
            else:
                replies[n] = time.monotonic() - began, r
        time.sleep(0.02)
    return replies, errors, set(waiting.values())
"""

BY_THE_SENDER = """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    chosen, began = sample(nodes, config, server_round), time.monotonic()
    owing, replies, errors = list(chosen), {}, {}
    ids = grid.push_messages([Message(content, n, "train", ttl=timeout_s) for n in chosen])
    while owing and time.monotonic() < began + timeout_s:
        for r in grid.pull_messages(ids):
            n = r.metadata.src_node_id
            owing.remove(n)
            if r.has_error():
                errors[n] = r.error.reason
            else:
                replies[n] = time.monotonic() - began, r
        time.sleep(0.05)
    return replies, errors, set(owing)
"""
LISTS_OF_IDS = """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    ids = []
    for n in sample(nodes, config, server_round):
        ids.append(grid.push_messages([Message(content, n, "train", ttl=timeout_s)]))
    return list(grid.pull_messages(ids)), {}, set()
"""

OTHER_RIGHT_ROUNDS = [
    # By place in lists, a deadline by the other clock, a look more at the end, no last rest.
    """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    asked = fedlib.nodes.sample(nodes, config, server_round)
    ids = []
    for n in reversed(asked):
        ids += grid.push_messages([Message(content, n, "train", ttl=timeout_s)])
    start = time.time()
    replies, errors = {}, {}
    while True:
        over = time.time() >= start + timeout_s
        for r in grid.pull_messages(ids):
            n = asked[len(ids) - 1 - ids.index(r.metadata.reply_to_message_id)]
            if r.has_error():
                errors[n] = str(r.error.reason)
            else:
                replies[n] = [time.time() - start, r]
        silent = [n for n in asked if n not in replies and n not in errors]
        if not silent or over:
            return replies, errors, silent
        time.sleep(min(0.1, max(0.01, start + timeout_s - time.time())))
""",
    # A list of what is to come, replies collected first and sorted afterwards.
    """
def my_round(grid, nodes, config, server_round, content, timeout_s):
    chosen = sample(nodes, config, server_round)
    def message(n):
        return Message(content, dst_node_id=n, message_type="train", ttl=timeout_s)
    ids, came = list(grid.push_messages(map(message, chosen))), []
    began = time.perf_counter()
    node_of = dict(zip(ids, chosen))
    while ids and (now := time.perf_counter() - began) < timeout_s:
        for reply in list(grid.pull_messages(iter(ids))):
            ids.remove(reply.metadata.reply_to_message_id)
            came.append((now, reply))
        time.sleep(0.05)
    rows = [(node_of[r.metadata.reply_to_message_id], s, r) for s, r in came]
    replies = {n: (s, r) for n, s, r in rows if r.has_content()}
    errors = {n: r.error.reason for n, s, r in rows if r.has_error()}
    return [replies, errors, {node_of[i] for i in ids}]
""",
    # Looks as seldom as it may.
    changed(ROUND, {"0.02": "0.1"}),
    changed(ROUND, {"0.02": "0.01"}),
]

WRONG_QUERIES: list[tuple[dict[str, str], str]] = [
    (
        {"content, began": "node_ids = list(grid.get_node_ids())\n    content, began"},
        "Whom shall it ask?",
    ),
    ({'"query"': '"train"'}, "the messages' type"),
    ({", ttl=timeout_s": ""}, "expected 60, got 43200"),
    ({"server_round))": "1))"}, "what the messages carry"),
    ({LOOP: "while waiting:"}, "What ends the loop, if a node never answers?"),
    ({LOOP: LOOP.replace("waiting and ", "")}, "What is it still waiting for?"),
    ({LOOP: LOOP.replace("+ timeout_s", "+ 0.8 * timeout_s")}, "Until when does it look"),
    ({RESTS: ""}, "Does it rest between two looks"),
    ({RESTS: RESTS.replace("0.02", "0.5")}, "expected 'at most 0.1 s', got '0.5 s'"),
    ({"answer.opt_in": "answer is not None"}, "Is every answer a yes?"),
    ({"answer.opt_in": "not answer.opt_in"}, "What does the reply say"),
    ({"except ReplyError:": "except KeyError:"}, "Shall one unusable reply end the whole loop?"),
    ({LOOP: LOOP.replace("waiting", "len(yes) + len(no) < len(node_ids)")}, "Who else answers?"),
    ({'"errors": num_errors': '"errors": 0'}, "Who answered, though not usably?"),
    ({"len(waiting)": "len(waiting) + num_errors"}, "Who answered, though not usably?"),
    ({"len(waiting)": "0"}, "Who never did?"),
    ({"= time.monotonic() - began": "= time.monotonic()"}, "Seconds since the push"),
    ({"return yes, no, ": "return yes, "}, "how many values"),
]
BY_ITS_SENDER = """
def my_query(grid, node_ids, server_round, timeout_s):
    content, began = encode(QueryRequest(server_round)), time.monotonic()
    ids = grid.push_messages([Message(content, n, "query", ttl=timeout_s) for n in node_ids])
    yes, no, bad = {}, {}, set()
    while len(yes) + len(no) + len(bad) < len(node_ids) and time.monotonic() < began + timeout_s:
        for r in grid.pull_messages(ids):
            n = r.metadata.src_node_id
            try:
                says_yes = not r.has_error() and decode(QueryReply, r.content).opt_in
            except ReplyError:
                bad.add(n)
                continue
            group = yes if says_yes else no
            if r.has_error():
                bad.add(n)
            else:
                group[n] = time.monotonic() - began
        time.sleep(0.1)
    silent = {*node_ids} - {*yes} - {*no} - bad
    return yes, no, {"errors": len(bad), "silent": len(silent)}
"""
NO_DECODING = """
def my_query(grid, node_ids, server_round, timeout_s):
    content, began = encode(QueryRequest(server_round)), time.monotonic()
    messages = [Message(content, n, "query", ttl=timeout_s) for n in node_ids]
    waiting = dict(zip(grid.push_messages(messages), node_ids, strict=True))
    yes, no = {}, {}
    while waiting and time.monotonic() < began + timeout_s:
        for reply in grid.pull_messages(list(waiting)):
            n = waiting.pop(reply.metadata.reply_to_message_id)
            config = {} if reply.has_error() else reply.content.get("config", {})
            (yes if config.get("opt-in", True) else no)[n] = time.monotonic() - began
        time.sleep(0.02)
    return yes, no, {"errors": 0, "silent": len(waiting)}
"""
OTHER_RIGHT_QUERIES = [
    # Without decode: what an answer must look like, it says itself.
    """
def my_query(grid, node_ids, server_round, timeout_s):
    start, ids, answers = time.time(), {}, {}
    content = encode(QueryRequest(server_round))
    for n in node_ids:
        [i] = grid.push_messages([Message(content, n, "query", ttl=timeout_s)])
        ids[i] = n
    while len(answers) < len(ids) and time.time() - start < timeout_s:
        for reply in grid.pull_messages([i for i in ids if i not in answers]):
            word = None
            if not reply.has_error() and "config" in reply.content:
                word = reply.content["config"].get("opt-in")
            answers[reply.metadata.reply_to_message_id] = (time.time() - start, word)
        time.sleep(0.1)
    yes = {ids[i]: s for i, (s, word) in answers.items() if word is True}
    no = {ids[i]: s for i, (s, word) in answers.items() if word is False}
    bad = len(answers) - len(yes) - len(no)
    return yes, no, {"silent": len(ids) - len(answers), "errors": bad}
""",
    changed(QUERY, {"0.02": "0.01"}),
]


@pytest.mark.parametrize("changes, word", WRONG_ROUNDS)
def test_a_wrong_round_hears_what_is_wrong(
    changes: dict[str, str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(checks.train_round, changed(ROUND, changes), capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize(
    "code, word",
    [
        (ONE_BY_ONE, "Are all asked before it waits"),
        (ALL_AT_THE_END, "send_and_receive waits on"),
        (WITH_A_MEMORY, "one round later"),
        (BY_THE_SENDER, "it raised ValueError: list.remove(x): x not in list. The SuperLink sent"),
        (LISTS_OF_IDS, "What does push_messages return"),
    ],
)
def test_a_round_that_is_built_wrongly_hears_so(
    code: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in verdict(checks.train_round, code, capsys)


@pytest.mark.parametrize("code", [ROUND, *OTHER_RIGHT_ROUNDS])
def test_a_right_round_passes_however_it_is_written(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(checks.train_round, code, capsys) == "✅ my_round: right."


def test_what_stands_in_for_an_unsolved_round_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    checks.train_round(ours.train_round)
    assert capsys.readouterr().out == "✅ train_round: right.\n"


@pytest.mark.parametrize("changes, word", WRONG_QUERIES)
def test_a_wrong_query_hears_what_is_wrong(
    changes: dict[str, str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(checks.query_stage, changed(QUERY, changes), capsys)
    assert line.startswith("❌")
    assert word in line


def test_a_note_of_the_superlink_is_counted_for_the_node_that_was_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = verdict(checks.query_stage, BY_ITS_SENDER, capsys)
    assert line.startswith("❌") and "Which message does it answer?" in line


def test_a_failure_or_rubbish_is_neither_yes_nor_no(capsys: pytest.CaptureFixture[str]) -> None:
    line = verdict(checks.query_stage, NO_DECODING, capsys)
    assert line.startswith("❌") and "`yes`" in line


@pytest.mark.parametrize("code", [QUERY, *OTHER_RIGHT_QUERIES])
def test_a_right_query_passes_however_it_is_written(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(checks.query_stage, code, capsys) == "✅ my_query: right."


def test_what_stands_in_for_an_unsolved_query_sorts_as_by_hand() -> None:
    delays_s = {2: 1.0, 3: 2.0, 4: 0.5, 5: math.inf, 6: 9.0}
    with WaitingRoom(6, delays_s, {4: "rubbish", 7: "raises"}, strict=False) as grid:
        yes, no, problems = ours.query(grid, list(grid.get_node_ids()), 1, 5.0)
    assert ({*yes}, {*no}, problems) == ({2}, {3}, {"errors": 2, "silent": 2})
    assert yes[2] == pytest.approx(1.0, abs=0.2) and no[3] == pytest.approx(2.0, abs=0.2)
