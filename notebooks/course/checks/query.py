"""Notebook 07: questions with a deadline."""

import math
from typing import Any

from course.checks.waiting import (
    NOTE,
    WaitingRoom,
    expect_end,
    expect_seconds,
    expect_sent,
    expect_three,
)
from course.ours import query
from course.verdict import Answer, check, expect, on_error
from fedlib.errors import ReplyError
from fedlib.messages import QUERY

LAST = 8  # the node whose yes comes just in time


@check
def yes_rate(answer: Answer) -> None:
    """Warner's estimate of the true yes-rate, from noisy answers."""
    hint = "How many of the yeses came from a coin, and how many nodes told the truth?"
    slips = {"A sign is wrong: do coins add to the truth?": 1.3}
    expect("40 % said yes, half told the truth", answer(0.4, 0.5), 0.3, hint, slips)
    expect("70 % said yes, 80 % told the truth", answer(0.7, 0.8), 0.75, hint)


@check
def volunteers(answer: Answer) -> None:
    """How many nodes opt in before the time-out, on average."""
    late, never_late = "Who says yes, and who is in time?", "Can more than all nodes be in time?"
    case = "81 nodes, yes 0.9, delays up to 4 s, time-out 1 s"
    rounded = {"Rounded?": 18, "Rounded up?": 19, "Rounded to a tenth?": 18.2}
    expect(case, answer(81, 0.9, 4, 1), 18.225, late, rounded)
    expect("50 nodes, yes 0.5, up to 2 s, time-out 5 s", answer(50, 0.5, 2, 5), 25, never_late)
    no_delay = "And without any delay: who is in time?"
    with on_error(ZeroDivisionError, no_delay):
        expect("50 nodes, yes 0.5, no delay, time-out 1 s", answer(50, 0.5, 0, 1), 25, no_delay)


@check
def query_stage(answer: Answer) -> None:
    """A QUERY to all nodes, until all have answered or the time is up; against ``Nodes.ask``."""
    # A node with an even number holds an even partition, and says yes.
    nodes = [11, 4, 7, 2, 9, 6, 5, 8]  # the three others are not to be asked
    delays_s = dict.fromkeys(nodes, 0.0) | {11: 0.5, 4: 3.0, 7: 1.0}

    def play(case: str, end_s: float, timeout_s: float, faults: dict[int, str]) -> None:
        grid = WaitingRoom(11, delays_s, faults)
        refused = "Shall one unusable reply end the whole loop? What is it to be counted as?"
        of_note = KeyError if "lost" in faults.values() else ()
        with on_error(ReplyError, refused), on_error(of_note, NOTE):
            result, sent, seconds = grid.play(answer, nodes, 3, timeout_s)
        expect_sent(sent, nodes, QUERY, timeout_s, "Whom shall it ask? Each is asked once.")
        for message in sent:
            came = {name: dict(record) for name, record in message.content.items()}
            wanted = {"config": {"server-round": 3}}
            expect("what the messages carry", came, wanted, "Which class is the question?")
        expect_three(result, "yes, no, problems?")
        with WaitingRoom(11, delays_s, faults, strict=False) as same:
            yes, no, problems = query(same, nodes, 3, timeout_s)
        slips: dict[str, Any] = {"Is every answer a yes?": {*yes, *no}}
        for name, came, right in (("yes", result[0], yes), ("no", result[1], no)):
            expect(f"{case}: `{name}` is", type(came).__name__, "dict")
            hint = "What does the reply say, and was it usable and in time?"
            slips |= {"Is a failure an answer?": {*right, *faults}}
            if end_s == timeout_s:
                slips |= {"Until when does it look for replies?": {*right} - {LAST}}
            expect(f"{case}: the nodes in `{name}`", {*came}, {*right}, hint, slips)
            expect_seconds(case, came, delays_s)
        hint = "Who answered, though not usably? Who never did?"
        by_sender = {NOTE: problems | {"silent": 1}} if "lost" in faults.values() else {}
        expect(f"{case}: `problems`", result[2], problems, hint, by_sender)
        early = "What is it still waiting for?" + (" Who else answers?" if faults else "")
        why = early if end_s < timeout_s else "When is the deadline?"
        expect_end(case, seconds, end_s, why)

    play("all answer", 3.0, 60.0, {})
    case = "5 fails, 4 sends rubbish, the SuperLink says that 2 is lost, the others answer"
    play(case, 3.0, 60.0, {5: "raises", 4: "rubbish", 2: "lost"})
    delays_s |= {2: math.inf, 6: 5.5, LAST: 4.8}
    case = "5 fails, 4 sends rubbish, 2 is silent, 6 takes 5.5 s, 8 takes 4.8 s, time-out 5 s"
    play(case, 5.0, 5.0, {5: "raises", 4: "rubbish"})
