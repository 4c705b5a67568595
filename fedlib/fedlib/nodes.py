"""The nodes as the server sees them: who is there, and what came back from a question."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlib import messages
from fedlib.config import Config
from fedlib.console import say
from fedlib.errors import FedlibError, ReplyError, one_line
from fedlib.randomness import SERVER, Stream, numpy_generator
from fedlib.results import Stage

POLL_INTERVAL_S = 0.02
POLL_SHARE, MAX_POLL_INTERVAL_S = 0.05, 0.5
"""The longer a question is out, the more seldom we look: over a network, looking costs both
sides something, and who looks the moment a reply is announced finds it without its arrays."""
IDENTIFY_TIMEOUT_S = 100.0  # the first message waits for the processes of a busy machine
REASON_LENGTH = 300
_EXPIRED = (3, 4)
"""Flower's MESSAGE_UNAVAILABLE and REPLY_MESSAGE_UNAVAILABLE, which its public API lacks."""

Accept = Callable[[int, RecordDict], None]
"""Takes a node id and the content of its reply; raises ``ReplyError`` to refuse it."""


@dataclass
class Federation:
    """The nodes behind a Grid.

    Attributes:
        grid: Flower's way to them.
        partitions: Which partition a node holds, by node id; filled by ``roll_call``.
        num_partitions: How many partitions there are, as the nodes say.
    """

    grid: Grid
    partitions: dict[int, int] = field(default_factory=dict)
    num_partitions: int = 0

    def roll_call(self, timeout_s: float, wait_for_all: bool = False) -> list[int]:
        """Ask nodes not seen before which partition they hold.

        Node ids are random and partition ids are not: sampling from the order of the partitions
        is what makes a seed choose the same nodes in every run, on every engine.

        Args:
            timeout_s: How long to wait for nodes, in seconds.
            wait_for_all: Wait until every partition has its node, not only until there are some.

        Returns:
            The ids of all known nodes that are connected, in the order of their partitions.

        Raises:
            FedlibError: No node is connected.
        """
        deadline = time.monotonic() + timeout_s
        asked: set[int] = set()
        problems: list[str] = []
        while True:
            online = set(self.grid.get_node_ids())
            new = online - self.partitions.keys() - asked
            asked |= new
            remaining = deadline - time.monotonic()
            if new and remaining > 0:
                timeout = min(remaining, IDENTIFY_TIMEOUT_S)
                stage = self.ask(messages.IDENTIFY, new, RecordDict(), timeout, self._register)
                for problem in stage.problems:
                    say(f"⚠️ roll call: {problem}")
                problems += stage.problems
            present = [node_id for node_id in self.partitions if node_id in online]
            complete = 0 < self.num_partitions <= len(online)  # all of them were asked by now
            if complete or remaining <= 0 or (present and not wait_for_all):
                break
            time.sleep(POLL_INTERVAL_S)
        if not present:
            raise FedlibError(
                f"no node answered within {timeout_s:g} s: start SuperNodes, or a simulation with "
                f"num-supernodes above 0" + "".join(f" ({problem})" for problem in problems[:1])
            )
        return sorted(present, key=lambda node_id: (self.partitions[node_id], node_id))

    def ask(
        self,
        message_type: str,
        node_ids: Collection[int],
        content: RecordDict,
        timeout_s: float,
        accept: Accept,
        *,
        late_is_normal: bool = False,
    ) -> Stage:
        """Send each node the same content and hand on every reply as it arrives.

        Not ``grid.send_and_receive``, which holds all replies in memory before it returns them.

        Args:
            message_type: ``train``, ``evaluate``, ``query`` or ``query.identify``.
            node_ids: Who is asked.
            content: What to send; it is serialised once, not once a node.
            timeout_s: How long to wait, in seconds; also the messages' time-to-live.
            accept: Takes each reply.
            late_is_normal: Count replies that do not come in time, but do not name the nodes.
        """
        stage = Stage(num_sent=len(node_ids))
        start = time.monotonic()
        num_bytes = messages.count_bytes(content)
        silent = set(node_ids)
        waiting: dict[str, int] = {}
        for node_id in node_ids:
            message = Message(content, node_id, message_type, ttl=timeout_s)
            # One at a time: push_messages leaves out the ids of those that it could not send.
            for message_id in self.grid.push_messages([message]):
                waiting[message_id] = node_id
                stage.bytes_sent += num_bytes
        deadline = time.monotonic() + timeout_s  # from now: pushing to many takes its time
        while waiting and time.monotonic() < deadline:
            replies = list(self.grid.pull_messages(list(waiting)))
            for reply in replies:
                asked = waiting.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None and self._take(reply, asked, accept, stage):
                    silent.discard(asked)
            if waiting and not replies:
                out_for = time.monotonic() - start
                pause = min(max(POLL_INTERVAL_S, POLL_SHARE * out_for), MAX_POLL_INTERVAL_S)
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        stage.num_missing = len(silent)
        if not late_is_normal:
            stage.problems += [
                f"{self.name(node_id)}: no reply within {timeout_s:g} s"
                for node_id in node_ids
                if node_id in silent
            ]
        stage.seconds = time.monotonic() - start
        return stage

    def name(self, node_id: int) -> str:
        """Return what to call a node in a line for people."""
        partition = self.partitions.get(node_id)
        return f"node {node_id}" + ("" if partition is None else f" (partition {partition})")

    def _register(self, node_id: int, content: RecordDict) -> None:
        identity = messages.decode_identity(content)
        if self.partitions and identity.num_partitions != self.num_partitions:
            raise ReplyError(
                f"num-partitions: expected {self.num_partitions} as of the nodes before it, "
                f"got {identity.num_partitions}; give all nodes the same"
            )
        holders = {n for n, p in self.partitions.items() if p == identity.partition_id}
        if holders and holders & set(self.grid.get_node_ids()):  # else it has come back
            say(f"⚠️ roll call: partition {identity.partition_id} is held by another node too.")
        self.partitions[node_id] = identity.partition_id
        self.num_partitions = identity.num_partitions

    def _take(self, reply: Message, node_id: int, accept: Accept, stage: Stage) -> bool:
        """Count a reply; False if it is the SuperLink's own note that none came in time."""
        try:
            if reply.has_error():
                if reply.metadata.src_node_id != node_id and reply.error.code in _EXPIRED:
                    return False
                raise ReplyError(_cause(reply.error.reason))
            stage.bytes_received += messages.count_bytes(reply.content)
            accept(node_id, reply.content)
            stage.num_received += 1
        except ReplyError as error:
            stage.num_errors += 1
            reason = one_line(error)
            if len(reason) > REASON_LENGTH:
                reason = reason[:REASON_LENGTH] + " …"
            stage.problems.append(f"{self.name(node_id)}: {reason}")
        return True


def sample(nodes: Sequence[int], config: Config, server_round: int) -> list[int]:
    """Sample a fraction of the nodes uniformly, without replacement; at least one."""
    rng = numpy_generator(config.seed, server_round, SERVER, Stream.SAMPLE)
    num_sampled = max(1, round(config.fraction_clients_train * len(nodes)))
    chosen = np.sort(rng.choice(len(nodes), size=num_sampled, replace=False))
    return [nodes[index] for index in chosen]


def _cause(reason: str | None) -> str:
    """Leave, of the two tracebacks in which Ray wraps a client's error, the error itself."""
    own, found, _ = (reason or "").partition("\n\nThe above exception was the direct cause")
    lines = own.splitlines()
    last_frame = max((n for n, line in enumerate(lines) if line.startswith(" ")), default=-1)
    return "\n".join(lines[last_frame + 1 :]) if found else own
