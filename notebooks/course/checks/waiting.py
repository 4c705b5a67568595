"""Nodes that answer late, with an error or never, and how a loop shall wait for them."""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Error, Message

from course.checks.toy import toy_app
from course.draw import is_reply
from course.verdict import Answer, expect, on_error, watch
from course.virtual import VirtualGrid
from fedlib.local_grid import SERVER_NODE_ID

LONGEST_REST_S = 0.1  # as the exercises say
LOOKS_A_SECOND = 300  # a rest of a hundredth makes a hundred
TOLERANCE_S = 2 * LONGEST_REST_S
LOST = "the node sends no heartbeat"  # what the SuperLink says
NOTE = "The SuperLink sent a note in its own name. Which message does it answer?"
NODE_LOST = 5  # NODE_UNAVAILABLE, which Flower's public API lacks


class WaitingRoom(VirtualGrid):
    """Toy nodes with a delay each, for a loop that rests, but never for long.

    Args:
        num_nodes: How many there are; node i + 2 holds partition i.
        delays_s: By the node's id: how long it works; ``math.inf`` if it never answers.
        faults: By the node's id: what it does instead (see ``toy_app``). Of a node that is
            ``lost`` the SuperLink says so, in its own name, as it does once no heartbeat comes.
        strict: Say how long and how seldom a loop may rest.
    """

    def __init__(
        self,
        num_nodes: int,
        delays_s: Mapping[int, float],
        faults: Mapping[int, str] | None = None,
        *,
        strict: bool = True,
    ) -> None:
        self.faults = dict(faults or {})
        of_partition = {node_id - 2: fault for node_id, fault in self.faults.items()}
        super().__init__(
            toy_app(of_partition),
            num_nodes,
            work_s=lambda message: delays_s.get(message.metadata.dst_node_id, 0.0),
        )
        self.strict, self.looks = strict, 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Look for replies, though not all the time."""
        self.looks += 1
        if self.strict and self.looks > LOOKS_A_SECOND * self.seconds + 100:
            times = f"{self.looks / max(self.seconds, 0.001):.0f} times a second"
            hint = "Does it rest between two looks, with time.sleep?"
            expect("how often it looks", times, f"at most {LOOKS_A_SECOND} times a second", hint)
        ids = list(message_ids)
        others = [type(i).__name__ for i in ids if not isinstance(i, str)]
        hint = "What does push_messages return for a list of one message?"
        expect("what is pulled", f"a {others[0]}" if others else "ids", "ids", hint)
        return super().pull_messages(ids)

    def _run(self, message: Message) -> Message | None:
        if self.faults.get(message.metadata.dst_node_id) != "lost":
            return super()._run(message)
        message.metadata.dst_node_id = SERVER_NODE_ID  # who the note is from; this is a copy
        return Message(Error(NODE_LOST, LOST), reply_to=message)

    def _sleep(self, seconds: float) -> None:
        longest = f"at most {LONGEST_REST_S} s"
        short = seconds <= LONGEST_REST_S + 1e-9 or not self.strict
        rest = longest if short else f"{seconds:g} s"
        expect("how long it rests at a time", rest, longest, "Who waits for it meanwhile?")
        super()._sleep(seconds)

    def play(self, answer: Answer, *given: Any) -> tuple[Any, list[Message], float]:
        """Let the learner's loop run; return its result, what it sent, and the seconds it took."""
        began, before = self.seconds, len(self.history)
        hint = "What ends the loop, if a node never answers?"
        try:
            with on_error(TimeoutError, hint), self:
                result = answer(self, *given)
        finally:
            if len(self.history) > before:  # there is something to see
                watch(self)
        rows = self.history[before:]
        sent = [row for row in rows if not is_reply(row[1])]
        if result is ... or (result is None and not sent):
            expect("what it returns", result, "")  # which says: not yet
        expect("what it returns", str(result) if result is None else "", "", "A `return`?")
        late = max((at_s - began for _, _, at_s in sent), default=0.0)
        hint = "Are all asked before it waits for anybody?"
        expect("when the last message was pushed, in seconds", round(late, 2), 0.0, hint)
        return result, [message for _, message, _ in sent], self.seconds - began


def expect_three(result: Any, hint: str) -> None:
    """Compare how many values came."""
    many = len(result) if isinstance(result, (tuple, list)) else type(result).__name__
    expect("how many values it returns", many, 3, hint)


def expect_sent(
    sent: list[Message], node_ids: Iterable[int], message_type: str, ttl: float, hint: str
) -> None:
    """Compare who was asked, once each, for what, and until when."""
    asked = sorted(message.metadata.dst_node_id for message in sent)
    expect("which nodes were asked", asked, sorted(node_ids), hint)
    for message in sent:
        expect("the messages' type", message.metadata.message_type, message_type)
        hint = "For how long is a message of use?"
        expect("the messages' ttl, in seconds", message.metadata.ttl, ttl, hint)


def expect_seconds(case: str, came: Mapping[int, Any], due_s: Mapping[int, float]) -> None:
    """Compare the moments at which replies were there; each may be noted a rest later."""
    for node_id, seconds in came.items():
        due = due_s[node_id]
        got = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else repr(seconds)[:40]
        if isinstance(seconds, (int, float)) and due - 0.01 <= seconds <= due + TOLERANCE_S:
            continue
        hint = "Seconds since the push, taken when the reply is there? send_and_receive waits on."
        expect(f"{case}: when the reply of node {node_id} came", got, f"{due:.1f} s", hint)


def expect_end(case: str, seconds: float, end_s: float, hint: str) -> None:
    """Compare how long it waited; it may be a rest longer."""
    on_time = end_s - TOLERANCE_S <= seconds <= end_s + TOLERANCE_S
    wanted = f"about {end_s:.1f} s"
    expect(f"{case}: how long it waits", wanted if on_time else f"{seconds:.1f} s", wanted, hint)
