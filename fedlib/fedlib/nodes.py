"""The nodes as the server sees them: who is there, and what they answer."""

import time
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
IDENTIFY_TIMEOUT_S = 100.0  # the first message waits for the processes of a busy machine
REASON_LENGTH = 300
EXPIRED = (3, 4)  # (REPLY_)MESSAGE_UNAVAILABLE, which Flower's public API lacks


@dataclass
class Nodes:
    """The nodes behind a Grid."""

    grid: Grid  # Flower's way to them
    partitions: dict[int, int] = field(default_factory=dict)  # which one a node holds, by its id
    num_partitions: int = 0  # how many there are, as the nodes say

    def roll_call(self, timeout_s: float, wait_for_all: bool = False) -> list[int]:
        """Ask new nodes which partition they hold; return those connected, by their partitions.

        Node ids are random and partition ids are not: sampling from the order of the partitions
        is what makes a seed choose the same nodes in every run, on every engine. This waits until
        there are some nodes, or with ``wait_for_all`` until every partition has its node, but for
        ``timeout_s`` seconds at most.

        Raises:
            FedlibError: No node is connected.
        """
        deadline = time.monotonic() + timeout_s
        asked, stage = set[int](), Stage()
        while True:
            online = set(self.grid.get_node_ids())
            new = online - self.partitions.keys() - asked
            asked |= new
            remaining = deadline - time.monotonic()
            if new and remaining > 0:
                known, limit_s = len(stage.problems), min(remaining, IDENTIFY_TIMEOUT_S)
                replies = self.ask(messages.IDENTIFY, new, RecordDict(), stage, limit_s)
                for node_id, identity in replies:
                    self._register(node_id, identity, stage)
                for problem in stage.problems[known:]:
                    say(f"⚠️ roll call: {problem}")
            present = [node_id for node_id in self.partitions if node_id in online]
            complete = 0 < self.num_partitions <= len(online)  # all of them were asked by now
            if complete or remaining <= 0 or (present and not wait_for_all):
                break
            time.sleep(POLL_INTERVAL_S)
        if not present:
            raise FedlibError(
                "no node answered in time: start SuperNodes, or a simulation with "
                "num-supernodes above 0" + "".join(f" ({p})" for p in stage.problems[:1])
            )
        return sorted(present, key=lambda node_id: (self.partitions[node_id], node_id))

    def ask(
        self,
        message_type: str,
        node_ids: Collection[int],
        content: RecordDict,
        stage: Stage,
        timeout_s: float,
    ) -> Iterator[tuple[int, Any]]:
        """Send each node the same content, and yield every usable reply as it arrives.

        Not ``grid.send_and_receive``, which holds all replies in memory before it returns them.

        The type is ``train``, ``evaluate``, ``query``, ``query.identify``, or your own; the timeout
        is also the messages' time-to-live. ``stage`` counts what came of it, once all replies were
        taken. Its problems name the nodes whose replies were unusable or missing; a QUERY may be
        missed without that.

        Yields:
            A node's id and its reply, decoded and checked (``fedlib.messages.REPLIES`` says to
            what; of a type of your own, the content). A model that comes back has the names,
            shapes and dtypes of the one that was sent.
        """
        start, num_bytes = time.monotonic(), messages.count_bytes(content)
        sent = None
        if message_type == messages.TRAIN:
            sent = messages.decode(messages.TrainRequest, content).model
        silent, waiting = set(node_ids), dict[str, int]()
        stage.num_sent += len(node_ids)
        for node_id in node_ids:
            message = Message(content, node_id, message_type, ttl=timeout_s)
            # One at a time: push_messages leaves out the ids of those that it could not send.
            for message_id in self.grid.push_messages([message]):
                waiting[message_id] = node_id
                stage.bytes_sent += num_bytes
        deadline = time.monotonic() + timeout_s  # from now: pushing to many takes its time
        while waiting and time.monotonic() < deadline:
            replies = list(self.grid.pull_messages(list(waiting)))
            for message in replies:
                asked = waiting.pop(message.metadata.reply_to_message_id, None)
                if asked is None or _is_note(message, asked):
                    continue
                silent.discard(asked)
                try:
                    reply = _read(message, message_type, stage, sent)
                except ReplyError as error:
                    stage.num_errors += 1
                    stage.problems.append(f"{self.name(asked)}: {_shortened(error)}")
                    continue
                stage.num_received += 1
                yield asked, reply
            if waiting and not replies:
                out_for = time.monotonic() - start
                pause = min(max(POLL_INTERVAL_S, POLL_SHARE * out_for), MAX_POLL_INTERVAL_S)
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        stage.num_missing += len(silent)
        if message_type != messages.QUERY:
            late = [node_id for node_id in node_ids if node_id in silent]
            stage.problems += [f"{self.name(n)}: no reply within {timeout_s:g} s" for n in late]
        stage.seconds += time.monotonic() - start

    def name(self, node_id: int) -> str:
        """Return what to call a node in a line for people."""
        partition = self.partitions.get(node_id)
        return f"node {node_id}" + ("" if partition is None else f" (partition {partition})")

    def _register(self, node_id: int, identity: messages.Identity, stage: Stage) -> None:
        if self.partitions and identity.num_partitions != self.num_partitions:
            stage.problems.append(
                f"{self.name(node_id)}: num-partitions: expected {self.num_partitions} as of the "
                f"nodes before it, got {identity.num_partitions}; give all nodes the same"
            )
            return
        holders = {n for n, p in self.partitions.items() if p == identity.partition_id}
        if holders and holders & set(self.grid.get_node_ids()):  # else it has come back
            say(f"⚠️ roll call: partition {identity.partition_id} is held by another node too.")
        self.partitions[node_id] = identity.partition_id
        self.num_partitions = identity.num_partitions


def sample(nodes: Sequence[int], config: Config, server_round: int) -> list[int]:
    """Sample a fraction of the nodes uniformly, without replacement; at least one."""
    rng = numpy_generator(config.seed, server_round, SERVER, Stream.SAMPLE)
    num_sampled = max(1, round(config.fraction_clients_train * len(nodes)))
    chosen = np.sort(rng.choice(len(nodes), size=num_sampled, replace=False))
    return [nodes[index] for index in chosen]


def _is_note(message: Message, asked: int) -> bool:
    """Is this the SuperLink's own note that no reply came in time?"""
    own = message.metadata.src_node_id != asked
    return message.has_error() and own and message.error.code in EXPIRED


def _read(message: Message, message_type: str, stage: Stage, sent: State | None) -> Any:
    if message.has_error():
        raise ReplyError(message.error.reason)
    stage.bytes_received += messages.count_bytes(message.content)
    kind = messages.REPLIES.get(message_type)
    reply: Any = messages.decode(kind, message.content) if kind else message.content
    if sent is not None:
        check_state(reply.model, sent)
    return reply


def _shortened(error: ReplyError) -> str:
    """Return a reason as one line; of a traceback the last one, which says what it was."""
    lines = str(error).splitlines()
    if any(line.startswith(" ") for line in lines):
        lines = [line for line in lines if line and not line.startswith(" ")][-1:]
    return one_line(" ".join(lines))[:REASON_LENGTH]
