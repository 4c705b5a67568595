"""LocalGrid: a small Grid, for tests and for seeing what a Grid is.

It runs a real ClientApp in this process, one message at a time, when the server asks for
replies. No engine for production: nothing runs in parallel, nothing crosses a wire. Since the
nodes take turns, give it ``query_max_delay=0``: else those asked first use up the QUERY's time.
"""

import itertools
import time
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from flwr.app import Context, Error, Message, Metadata, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# The Message constructor reads the sender's identity from this private class; the engines set it
# before they call an app. There is no public way to do so, and this is the one place that does.
from flwr.supercore.task_identity import TaskIdentity

from fedlib.errors import describe

SERVER_NODE_ID = 1
CLIENT_RAISED = 2  # CLIENT_APP_RAISED_EXCEPTION, which Flower's public API lacks


def enter_local_run() -> None:
    """Let this process make messages outside any engine, as the server of run 1.

    ``Message(content, dst_node_id, message_type)`` asks who is speaking and in which run; an
    engine says so before it calls an app. Here nobody does, so this function does.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE_ID, 1


class LocalGrid(Grid):
    """A Grid whose nodes live in this process.

    Node i + 2 holds partition i and finds ``run_config`` in its context.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int, run_config: UserConfig | None = None
    ) -> None:
        enter_local_run()
        self.client_app = client_app
        self.contexts = {
            partition_id + 2: Context(
                run_id=1,
                node_id=partition_id + 2,
                node_config={"partition-id": partition_id, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=run_config or {},
            )
            for partition_id in range(num_nodes)
        }
        self._ids = itertools.count(1)
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages in the queue; nothing runs yet."""
        came = [_with_id(message, str(next(self._ids))) for message in messages]
        self._waiting |= {message.metadata.message_id: message for message in came}
        return [message.metadata.message_id for message in came]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of these messages that waits, and return its reply, if it is in time."""
        for message_id in message_ids:
            if message := self._waiting.pop(message_id, None):
                reply = self._run(message)
                if reply is None:  # the app broke the rule that a message gets a reply
                    return []
                expires_at = reply.metadata.created_at + reply.metadata.ttl
                return [reply] if time.time() <= expires_at else []
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return their replies, without those after the timeout."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        for message_id in list(self.push_messages(messages)):
            if time.monotonic() < end:
                came = self.pull_messages([message_id])
                replies.extend(came if time.monotonic() < end else [])
        return replies

    def _run(self, message: Message) -> Message | None:
        try:
            reply = self.client_app(message, self.contexts[message.metadata.dst_node_id])
            if not isinstance(reply, Message | None):
                raise TypeError(f"expected a Message as the reply, got {type(reply).__name__}")
            return deepcopy(reply)  # as it would be on its way: the app may keep what it returned
        except Exception as error:  # as the engines do: the server gets an error, not a crash
            return Message(Error(CLIENT_RAISED, describe(error)), reply_to=message)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not available, nor are the next two: the abstract class asks for them."""
        raise NotImplementedError("LocalGrid: make a Message instead")

    @property
    def run(self) -> Any:
        """Not available: there is no run."""
        raise NotImplementedError("LocalGrid has no Run")

    def set_run(self, run: Any) -> None:
        """Do nothing: there is no run."""


def _with_id(message: Message, message_id: str) -> Message:
    """Return a copy of the message with an id, as the SuperLink gives it one on arrival."""
    old = message.metadata
    metadata = Metadata(
        run_id=old.run_id,
        message_id=message_id,
        src_node_id=old.src_node_id,
        dst_node_id=old.dst_node_id,
        reply_to_message_id="",
        group_id=old.group_id,
        created_at=old.created_at,
        ttl=old.ttl,
        message_type=old.message_type,
    )
    copy: Message = Message(content=deepcopy(message.content), metadata=metadata)  # type: ignore[call-overload]
    return copy
