"""A Grid on a clock of its own: an hour of waiting takes seconds, and the same seconds each time.

with VirtualGrid(client_app, 50, work_s=lambda message: 3.0) as grid:
    main(grid)
print(grid.seconds)
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from flwr.app import Message, UserConfig
from flwr.clientapp import ClientApp

from course.draw import WatchedGrid

START = 4e9  # later than the clock that Flower stamps replies with, which cannot be changed
LOOK_S = 0.001  # how long a look takes that finds nothing, so that a loop without rest ends too
WAY_S = 0.001  # how long a reply is on its way
MAX_WAITS = 50_000


class VirtualGrid(WatchedGrid):
    """A LocalGrid whose nodes work side by side, on a clock that moves only while somebody waits.

    Inside the ``with`` block ``time.time``, ``time.monotonic``, ``time.perf_counter`` and
    ``time.sleep`` are this clock's, for the thread that entered it: for the server's loop, and for
    the handlers, each on the clock of its node. Computing takes no time on it. A node takes one
    message after another. No message is handed to a node, and no reply to the server, after the
    message's time-to-live.

    Args:
        client_app: What the nodes run.
        num_nodes: How many there are; node i + 2 holds partition i.
        run_config: What the nodes find in their contexts.
        work_s: How many seconds a node takes for a message, beside those that its handler sleeps;
            ``math.inf`` if it never gets to it.

    Raises:
        TimeoutError: The server waited 50,000 times, so its loop probably never ends.
    """

    shows_time = True

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: UserConfig | None = None,
        *,
        work_s: Callable[[Message], float] = lambda message: 0.0,
    ) -> None:
        super().__init__(client_app, num_nodes, run_config)
        self.work_s = work_s
        self._now, self._waits, self._depth = START, 0, 0
        self._free_at = dict.fromkeys(self.contexts, START)
        self._due: dict[str, tuple[float, Message]] = {}

    @property
    def seconds(self) -> float:
        """How much time has passed on this clock."""
        return self._now - START

    def __enter__(self) -> Self:
        """Let this thread's ``time`` be the virtual one; entering twice does no harm."""
        self._depth += 1
        if self._depth > 1:
            return self
        thread = threading.get_ident()
        self._real: dict[str, Any] = {}

        def here(name: str, virtual: Callable[..., Any]) -> None:
            real = self._real[name] = getattr(time, name)

            def either(*given: float) -> Any:
                return (virtual if threading.get_ident() == thread else real)(*given)

            setattr(time, name, either)

        for name in ("time", "monotonic", "perf_counter"):
            here(name, lambda: self._now)
        here("sleep", self._sleep)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the real time back."""
        self._depth -= 1
        if self._depth:
            return
        for name, real in self._real.items():
            setattr(time, name, real)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes; what they reply, and when, is decided here.

        Raises:
            LookupError: There is no such node; nothing was sent.
        """
        messages = list(messages)
        for node_id in (message.metadata.dst_node_id for message in messages):
            if node_id not in self.contexts:
                raise LookupError(
                    f"no node has the id {node_id}: get_node_ids says which there are"
                )
        ids = list(super().push_messages(messages))
        for message_id in ids:
            message = self._waiting.pop(message_id)
            message.metadata.created_at = self._now
            node_id, expires_at = message.metadata.dst_node_id, self._now + message.metadata.ttl
            starts_at, work_s = max(self._now, self._free_at[node_id]), self.work_s(message)
            if starts_at + work_s < expires_at:
                server_now, self._now = self._now, starts_at  # the handler's clock is its node's
                try:
                    reply = self._run(message)
                    if reply is not None and not _ends_with(reply, message):  # a ttl of its own
                        reply.metadata.created_at = self._now
                    done_at = self._now + work_s
                finally:
                    self._now = server_now
                self._free_at[node_id] = done_at
                if reply is not None:
                    self._due[message_id] = done_at + WAY_S, reply
            elif starts_at < expires_at and work_s < float("inf"):
                self._free_at[node_id] = starts_at + work_s  # it works on, for nobody
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there by now, in the order in which they came."""
        due = [(*self._due[i], i) for i in dict.fromkeys(message_ids) if i in self._due]
        due = [row for row in due if row[0] <= self._now]
        came = sorted(due, key=lambda row: (row[0], int(row[2])))  # ids count up
        replies = []
        for _, reply, message_id in came:
            del self._due[message_id]
            if self._now <= reply.metadata.created_at + reply.metadata.ttl:
                replies.append(reply)
                self._note(message_id, reply)
        if not replies:
            self._sleep(LOOK_S)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, and wait for their replies until all are there or the time is up."""
        messages = list(messages)
        longest = max((message.metadata.ttl for message in messages), default=0.0)
        end = self._now + max(0.0, longest if timeout is None else timeout)
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting:
            self._now = min([end, *(self._due[i][0] for i in waiting if i in self._due)])
            came = list(self.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if self._now >= end:
                break
        return replies

    def _sleep(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self._waits += 1
        if self._waits > MAX_WAITS:
            raise TimeoutError(f"it still waits after {MAX_WAITS:,} looks and rests")
        self._now += seconds

    def _note(self, message_id: str, message: Message) -> None:
        self.history.append((message_id, message, self.seconds))


def _ends_with(reply: Message, message: Message) -> bool:
    """Does a reply expire when its message does, as it does where nobody said otherwise?"""
    ends = (m.metadata.created_at + m.metadata.ttl for m in (reply, message))
    return abs(next(ends) - next(ends)) < LOOK_S
