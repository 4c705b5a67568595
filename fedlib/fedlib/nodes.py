"""The nodes as the server sees them: who is there, and what they answer."""

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlib import messages
from fedlib.config import Config
from fedlib.console import say
from fedlib.errors import FedlibError, ReplyError, one_line
from fedlib.model import State, check_state
from fedlib.randomness import SERVER, Stream, numpy_generator
from fedlib.run_directory import Stage

POLL_INTERVAL_S = 0.02
# The longer a question is out, the more seldom we look: over a network, looking costs both
# sides something, and who looks the moment a reply is announced finds it without its arrays.
POLL_SHARE, MAX_POLL_INTERVAL_S = 0.05, 0.5
REASON_LENGTH = 300
EXPIRED = (3, 4)  # (REPLY_)MESSAGE_UNAVAILABLE, which Flower's public API lacks


@dataclass
class Nodes:
    """The nodes behind a Grid."""

    grid: Grid  # Flower's way to them
    num_partitions: int = 0  # as most of the nodes say
    _identities: dict[int, messages.Identity] = field(default_factory=dict)
    _asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # node and deadline, by id
    _tried: set[int] = field(default_factory=set)  # whom an earlier roll call has asked
    _problems: list[str] = field(default_factory=list)

    @property
    def partitions(self) -> dict[int, int]:
        """Which partition a node holds, by its id."""
        known, num_partitions = self._identities.items(), self.num_partitions
        return {i: who.partition_id for i, who in known if who.num_partitions == num_partitions}

    def roll_call(
        self, timeout_s: float, wait_for_all: bool = False, new_timeout_s: float = math.inf
    ) -> list[int]:
        """Ask new nodes which partition they hold; return those connected, by their partitions.

        Node ids are random and partition ids are not: sampling from the order of the partitions
        is what makes a seed choose the same nodes in every run, on every engine.

        This waits until some nodes are there and those that are new have answered, though no longer
        than ``new_timeout_s`` for the latter; with ``wait_for_all``, until every partition has its
        node; and never longer than ``timeout_s``. Who has not answered by then is asked anew in the
        background, holds nobody up again, and takes part once it has answered.

        Raises:
            FedlibError: No node is connected, or none has answered.
        """
        began, deadline = time.monotonic(), time.monotonic() + timeout_s
        first, tried = not self.partitions, set[int]()
        enough_of_new = began + new_timeout_s
        while True:
            online = set(self.grid.get_node_ids())
            tried |= self._ask_new(online - tried, deadline)
            self._register(vote=first or wait_for_all)
            silent = online & {node_id for node_id, _ in self._asked.values()}
            partitions = self.partitions
            present = [node_id for node_id in partitions if node_id in online]
            complete = 0 < self.num_partitions <= len(online - silent)
            now, new = time.monotonic(), silent & tried - self._tried
            enough = complete if wait_for_all else present and (not new or now >= enough_of_new)
            if enough or now >= deadline:
                break
            time.sleep(_pause(began, min(deadline, enough_of_new) if present else deadline))
        self._tried |= tried
        for node_id in online & self._identities.keys() - partitions.keys():
            self._report(
                f"{self.name(node_id)}: num-partitions: expected {self.num_partitions} as of most "
                f"nodes, got {self._identities[node_id].num_partitions}; give all nodes the same"
            )
        for partition, held in Counter(partitions[node_id] for node_id in present).items():
            if held > 1:
                self._report(f"partition {partition}: held by {held} nodes")
        if not present:
            raise FedlibError(
                f"roll call: expected an answer within {timeout_s:g} s, got none from "
                f"{len(online)} connected nodes; look at their logs, or raise the time limit"
                + "".join(f" ({problem})" for problem in self._problems[:1])
                if online
                else f"roll call: expected nodes within {timeout_s:g} s, got none; start "
                f"SuperNodes, or a simulation with num-supernodes above 0"
            )
        return sorted(present, key=lambda node_id: (partitions[node_id], node_id))

    def _ask_new(self, online: set[int], deadline: float) -> set[int]:
        """Ask whom we do not know yet, and return them."""
        now = time.monotonic()
        self._asked = {i: asked for i, asked in self._asked.items() if now < asked[1]}
        new = online - self.partitions.keys() - {node_id for node_id, _ in self._asked.values()}
        for node_id in new if now < deadline else ():
            message = Message(RecordDict(), node_id, messages.IDENTIFY, ttl=deadline - now)
            for message_id in self.grid.push_messages([message]):
                self._asked[message_id] = node_id, deadline
        return new

    def _register(self, vote: bool) -> None:
        """Take what answers have come; with ``vote``, the majority says how many partitions."""
        while self._asked and (replies := list(self.grid.pull_messages(list(self._asked)))):
            for message in replies:
                self._take(message)
        if vote and self._identities:
            counts = Counter(identity.num_partitions for identity in self._identities.values())
            # Of two that are as many, the larger number: not the one that came first this time.
            self.num_partitions = max(counts, key=lambda number: (counts[number], number))

    def _take(self, message: Message) -> None:
        """Take a node's answer to the roll call, if the message is one."""
        node_id, _ = self._asked.pop(message.metadata.reply_to_message_id, (0, 0.0))
        if not node_id or _is_note(message, node_id):
            return
        try:
            self._identities[node_id] = _read(message, messages.Identity, Stage(), None)
        except ReplyError as error:
            self._report(f"{self.name(node_id)}: {_shortened(error)}")

    def _report(self, problem: str) -> None:
        """Say what is wrong with a node, once."""
        if problem not in self._problems:
            self._problems.append(problem)
            say(f"⚠️ roll call: {problem}")

    def ask(
        self,
        message_type: str,
        node_ids: Collection[int],
        content: RecordDict,
        stage: Stage,
        timeout_s: float,
        kind: type | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Send each node the same content, and yield every usable reply as it arrives.

        Not ``grid.send_and_receive``, which holds all replies in memory before it returns them.

        The type is ``train``, ``evaluate``, ``query``, ``query.identify``, or your own; the timeout
        is also the messages' time-to-live. ``stage`` counts what came of it, once all replies were
        taken. Its problems name the nodes whose replies were unusable or missing; a QUERY may be
        missed without that.

        Yields:
            A node's id and its reply, decoded as a ``kind``, else as ``fedlib.messages.REPLIES``
            says, else as it came. A model in it has the names, shapes and dtypes of the one sent.
        """
        start, num_bytes = time.monotonic(), messages.count_bytes(content)
        kind, sent = kind or messages.REPLIES.get(message_type), messages.sent_model(content)
        silent, waiting = set(node_ids), dict[str, int]()
        stage.num_sent += len(node_ids)
        for node_id in node_ids:
            message = Message(content, node_id, message_type, ttl=timeout_s)
            # One at a time: push_messages leaves out the ids of those that it could not send.
            for message_id in self.grid.push_messages([message]):
                waiting[message_id] = node_id
                stage.bytes_sent += num_bytes
        deadline = time.monotonic() + timeout_s  # from now: pushing to many takes its time
        in_time = True
        while waiting and in_time:
            in_time = time.monotonic() < deadline  # if not, this is the last look
            # With what new nodes have answered to the roll call: it may expire before the next.
            replies = list(self.grid.pull_messages([*waiting, *self._asked]))
            for message in replies:
                asked = waiting.pop(message.metadata.reply_to_message_id, None)
                if asked is None:
                    self._take(message)
                    continue
                if _is_note(message, asked):
                    continue
                silent.discard(asked)
                try:
                    reply = _read(message, kind, stage, sent)
                except ReplyError as error:
                    stage.num_errors += 1
                    stage.problems.append(f"{self.name(asked)}: {_shortened(error)}")
                    continue
                stage.num_received += 1
                yield asked, reply
            if waiting and in_time and not replies:
                time.sleep(_pause(start, deadline))
        stage.num_missing += len(silent)
        if message_type != messages.QUERY:
            late = [node_id for node_id in node_ids if node_id in silent]
            stage.problems += [f"{self.name(n)}: no reply within {timeout_s:g} s" for n in late]
        stage.seconds += time.monotonic() - start

    def name(self, node_id: int) -> str:
        """Return what to call a node in a line for people."""
        partition = self.partitions.get(node_id)
        return f"node {node_id}" + ("" if partition is None else f" (partition {partition})")


def sample(nodes: Sequence[int], config: Config, server_round: int) -> list[int]:
    """Sample a fraction of the nodes uniformly, without replacement; at least one."""
    rng = numpy_generator(config.seed, server_round, SERVER, Stream.SAMPLE)
    num_sampled = max(1, round(config.fraction_clients_train * len(nodes)))
    chosen = np.sort(rng.choice(len(nodes), size=num_sampled, replace=False))
    return [nodes[index] for index in chosen]


def _pause(began: float, deadline: float) -> float:
    now = time.monotonic()
    pause = min(max(POLL_INTERVAL_S, POLL_SHARE * (now - began)), MAX_POLL_INTERVAL_S)
    left = max(0.0, deadline - now)
    # Closer looks towards the end: a reply expires with its message, and is not handed out then.
    return min(pause, max(POLL_INTERVAL_S, left / 2), left)


def _is_note(message: Message, asked: int) -> bool:
    """Is this the SuperLink's own note that no reply came in time?"""
    own = message.metadata.src_node_id != asked
    return message.has_error() and own and message.error.code in EXPIRED


def _read(message: Message, kind: type | None, stage: Stage, sent: State | None) -> Any:
    if message.has_error():
        raise ReplyError(message.error.reason or f"error {message.error.code} without a reason")
    stage.bytes_received += messages.count_bytes(message.content)
    reply: Any = messages.decode(kind, message.content) if kind else message.content
    if sent is not None and hasattr(reply, "model"):
        check_state(reply.model, sent)
    return reply


def _shortened(error: ReplyError) -> str:
    """Return a reason as one line; of a traceback the last one, which says what it was."""
    lines = str(error).splitlines()
    if any(line.startswith(" ") for line in lines):
        lines = [line for line in lines if line and not line.startswith(" ")][-1:]
    return one_line(" ".join(lines))[:REASON_LENGTH]
