"""The contest at the end of the course: unequal nodes with faults, a hidden deadline, a score.

contest = Contest(seed=42)
contest.play(main, "my first try")
print(contest.table())
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from time import monotonic  # the real one: a grid puts its own in its place in the module
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from course.draw import is_reply
from course.virtual import START, VirtualGrid
from fedlib import (
    Config,
    Dataset,
    Partition,
    ReplyError,
    Split,
    State,
    check_state,
    evaluate,
    load_partition,
    make_client_app,
    make_model,
    open_dataset,
)
from fedlib.client_app import Node, answer, handle_evaluate, handle_train
from fedlib.data import FASHION_MNIST
from fedlib.errors import describe
from fedlib.messages import (
    EVALUATE,
    IDENTIFY,
    TRAIN,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    count_bytes,
    decode,
    encode,
)
from fedlib.training import single_thread

MEGABYTES_A_POINT, MINUTES_A_POINT = 20, 2
"""What a point of the score pays for."""
FAULTS = ("raises", "silent", "nan", "boasts")  # each the permanent fault of one node
NUM_AWAY = 3  # so many others are away for a while
BOAST = 10**9
EVALUATE_SHARE = 1 / 12  # of a training's time: a quarter of the images, and no gradients
STILL_S, STILL_LOOK_S = 5.0, 0.002
"""So long may main be busy while the contest's clock stands still: in all, and for each look."""
END_WIDTH = 60  # of the table's last column

HandIn = Callable[[State], None]
Main = Callable[[Grid, HandIn], object]


class TimeIsUp(BaseException):
    """The deadline has come; not an ``Exception``, so that no main catches it by accident."""


@dataclass(frozen=True)
class Traits:
    """How a node is."""

    train_s: float  # how long a training takes
    fault: str = ""  # a permanent one, of FAULTS
    away: tuple[float, float] = (inf, inf)  # from when to when it answers nothing


@dataclass(frozen=True)
class Try:
    """What a main came to."""

    name: str
    accuracy: float  # of the model handed in last, 0 to 1; 0 if there was none
    megabytes: float  # that the server sent and that the nodes sent
    seconds: float  # on the contest's clock, until main ended
    end: str  # how it ended
    model: State | None = field(default=None, repr=False, compare=False)  # handed in last

    @property
    def score(self) -> float:
        """Accuracy in percent, less the points that megabytes and minutes cost."""
        cost = self.megabytes / MEGABYTES_A_POINT + self.seconds / 60 / MINUTES_A_POINT
        return 100 * self.accuracy - cost


class ContestGrid(VirtualGrid):
    """A VirtualGrid whose nodes differ and fail, which counts bytes and closes at a deadline."""

    def __init__(self, app: ClientApp, nodes: Sequence[Traits], deadline_s: float) -> None:
        super().__init__(app, len(nodes), work_s=self._work)
        self._nodes = dict(zip(self.contexts, nodes, strict=True))
        self._deadline_s = deadline_s
        self._bytes_sent = 0
        self._replies = list[tuple[float, int]]()  # when it was sent, and its bytes
        self._looks, self._still_s = 0, 0.0  # since the clock moved last: vain ones, and real time
        self._looked_at, self._left_at = self._now, monotonic()  # on this clock, and on the real

    @property
    def megabytes(self) -> float:
        """What went over the wire by now: also replies that the server has not taken."""
        end = min(self.seconds, self._deadline_s)
        came = (num_bytes for at, num_bytes in self._replies if at <= end)
        return (self._bytes_sent + sum(came)) / 1e6

    @property
    def has_trained(self) -> bool:
        """Has the server taken a trained model, be it usable or not?"""
        trains = (m for _, m, _ in self.history if m.metadata.message_type == TRAIN)
        return any(is_reply(message) and message.has_content() for message in trains)

    def expect_time(self) -> None:
        """Raise TimeIsUp once the deadline has come."""
        if self.seconds >= self._deadline_s:
            raise TimeIsUp

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes: being away does not show."""
        self.expect_time()
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes, and count the bytes of both ways."""
        self.expect_time()
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self._bytes_sent += sum(_size(message) for message in messages)
        done = [self._due[message_id] for message_id in ids if message_id in self._due]
        self._replies += [(at - START, _size(reply)) for at, reply in done]
        self._left_at = monotonic()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there by now."""
        self.expect_time()
        self._expect_moving_clock()
        replies = super().pull_messages(message_ids)
        self._looked_at, self._left_at = self._now, monotonic()
        return replies

    def _expect_moving_clock(self) -> None:
        """Refuse a main that lets real time pass between its looks, and none on this clock."""
        if self._now > self._looked_at:
            self._looks, self._still_s = 0, 0.0
            return
        self._looks += 1
        self._still_s += monotonic() - self._left_at
        if self._still_s > max(STILL_S, STILL_LOOK_S * self._looks):
            raise RuntimeError("you wait on the real clock: write time.sleep, after import time")

    def _run(self, message: Message) -> Message | None:
        with torch.enable_grad():  # the nodes may train, and main may not
            return super()._run(message)

    def _sleep(self, seconds: float) -> None:
        self._waits = 0  # the deadline ends a loop, however often it looks
        super()._sleep(seconds)
        self.expect_time()

    def _work(self, message: Message) -> float:
        """Say how long a node takes, from when it is free; for ever, if no reply will come."""
        node_id, verb = message.metadata.dst_node_id, message.metadata.message_type
        node = self._nodes[node_id]
        work_s = {TRAIN: node.train_s, EVALUATE: node.train_s * EVALUATE_SHARE}.get(verb, 0.0)
        starts_at = max(self._now, self._free_at[node_id]) - START
        leaves_at, returns_at = node.away
        is_away = starts_at < returns_at and starts_at + work_s >= leaves_at
        return inf if is_away or (node.fault == "silent" and verb != IDENTIFY) else work_s


def run_main(main: Main, grid: ContestGrid, reference: State, handed_in: list[State]) -> None:
    """Call a main; only the last model that it hands in stays in ``handed_in``.

    Main gets no gradients, so it cannot train by itself.

    Raises:
        TimeIsUp: It did not return before the deadline.
        Exception: Whatever main raised.
    """

    def hand_in(state: State) -> None:
        grid.expect_time()
        values = state.values() if isinstance(state, Mapping) else [None]
        if not all(isinstance(value, Tensor) for value in values):
            came = type(state).__name__
            raise TypeError(f"hand_in: expected a state, which is tensors by name, got {came}")
        try:
            check_state(state, reference)
        except ReplyError as error:  # main takes this kind for a node's
            raise TypeError(f"hand_in: {error}") from error
        handed_in[:] = [{key: tensor.detach().clone() for key, tensor in state.items()}]

    with grid, torch.no_grad(), single_thread():  # more threads wait for one another
        main(grid, hand_in)


@dataclass
class Contest:
    """A contest, in which everything follows from the seed.

    Args:
        seed: Decides which nodes are slow, which fail and how, which images they hold, and when
            the deadline comes.
        num_nodes: How many nodes there are.
        images: How many images a node holds, on average; four fifths of them to train on.
        dataset: What ``fedlib.open_dataset`` takes.
        exam_images: On how many images, which no node holds, the model is examined.
        minutes: Between which two moments the deadline comes, on the contest's clock.
    """

    seed: int = 42
    num_nodes: int = 20
    images: int = 300
    dataset: str = FASHION_MNIST
    exam_images: int = 10_000
    minutes: tuple[float, float] = (6, 10)
    tries: list[Try] = field(default_factory=list)
    grid: ContestGrid | None = None  # the last try's, to draw

    def play(self, main: Main, name: str) -> Try:
        """Run a main until it returns or raises or the time is up; add the try to the table."""
        nodes, deadline_s = self._draw()
        app = contest_app(Config(seed=self.seed, dataset=self.dataset), nodes, self._share)
        grid = self.grid = ContestGrid(app, nodes, deadline_s)
        reference = make_model(self._data, torch.Generator()).state_dict()
        handed_in, end = list[State](), "it returned"
        try:
            run_main(main, grid, reference, handed_in)
        except TimeIsUp:
            end = "time was up"
        except Exception as error:
            end = describe(error)
        if handed_in and not grid.has_trained:
            handed_in, end = [], f"{end}; no node had trained"
        model = handed_in[-1] if handed_in else None
        accuracy, seconds = self._examine(model) if model else 0.0, min(grid.seconds, deadline_s)
        self.tries.append(Try(name, accuracy, grid.megabytes, seconds, end, model))
        return self.tries[-1]

    def table(self) -> str:
        """Return all tries as a table, in their order."""
        lines = [f"{'':24} accuracy     MB  minutes  score  ended because"]
        for t in self.tries:
            numbers = f"{100 * t.accuracy:6.1f} % {t.megabytes:6.1f} {t.seconds / 60:8.1f}"
            lines.append(f"{t.name[:24]:24} {numbers} {t.score:6.1f}  {_shorten(t.end)}")
        return "\n".join(lines)

    @cached_property
    def _data(self) -> Dataset:
        return open_dataset(self.dataset)

    def _partition(self, partition_id: int) -> Partition:
        """Return the partition of which a node holds the beginning."""
        alpha = Config().dirichlet_alpha
        return load_partition(self._data, self.num_nodes, alpha, self.seed, partition_id)

    @cached_property
    def _share(self) -> float:
        """Which share of its partition a node holds."""
        sizes = [len(self._partition(i).train) for i in range(self.num_nodes)]
        share = 0.8 * self.images / float(np.mean(sizes))
        left = min((1 - share) * size for size in sizes)
        if left < self.exam_images / self.num_nodes:
            raise ValueError(
                f"contest: expected to find {self.exam_images} images that no node holds, "
                f"got too few; lower images, exam_images or num_nodes"
            )
        return share

    def _draw(self) -> tuple[list[Traits], float]:
        """Draw how the nodes are, and the deadline."""
        rng = np.random.default_rng([self.seed, 2026])
        deadline_s = 60 * rng.uniform(*self.minutes)
        order = rng.permutation(self.num_nodes)
        faults = dict(zip(order, FAULTS, strict=False))
        leave_at = rng.uniform(0, 0.6, NUM_AWAY) * deadline_s
        away = dict(zip(order[len(FAULTS) :], leave_at, strict=False))
        image_s = 0.1 * np.exp(rng.normal(0, 0.7, self.num_nodes))
        nodes = []
        for i, seconds in enumerate(image_s):
            train_s = float(seconds) * len(_beginning(self._partition(i).train, self._share))
            leaves_at = float(away.get(i, inf))
            window = leaves_at, leaves_at + deadline_s / 3
            nodes.append(Traits(train_s, faults.get(i, ""), window))
        return nodes, float(deadline_s)

    def _examine(self, state: State) -> float:
        """Return the accuracy on the ends of the partitions, which no node holds."""
        parts = [self._partition(i).train for i in range(self.num_nodes)]
        last = self.exam_images // self.num_nodes
        images, labels = (
            torch.cat([getattr(part, what)[-last:] for part in parts])
            for what in ("images", "labels")
        )
        model = make_model(self._data, torch.Generator())
        model.load_state_dict(state)
        with single_thread():
            found = evaluate(model, Split(images, labels, self._data.mean, self._data.std))
        return found.accuracy


@dataclass(frozen=True)
class ContestNode(Node):
    """A node that holds the beginning of its partition only."""

    share: float

    def load(self, dataset: Dataset, device: str) -> Partition:
        """Return the node's own data."""
        whole = super().load(dataset, device)
        return Partition(*(_beginning(s, self.share) for s in (whole.train, whole.validation)))


def contest_app(config: Config, nodes: Sequence[Traits], share: float) -> ClientApp:
    """Return fedlib's ClientApp with the nodes' faults.

    A node computes in float32, whatever the dtype in which the model comes, and sends its own model
    in the dtype in which the global one came.
    """
    app, fedlibs = ClientApp(), make_client_app(config)
    kinds = {TRAIN: (TrainRequest, handle_train), EVALUATE: (EvaluateRequest, handle_evaluate)}

    def handle(message: Message, node: Node) -> RecordDict:
        kind, handler = kinds[message.metadata.message_type]
        fault = nodes[node.partition_id].fault
        if fault == "raises":
            raise OSError("my disk is full")
        request: Any = decode(kind, message.content)
        model = {key: tensor.float() for key, tensor in request.model.items()}
        message.content = encode(replace(request, model=model))
        place = node.config, node.partition_id, node.num_partitions, node.state
        content = handler(message, ContestNode(*place, share))
        if kind is not TrainRequest:
            return content
        reply = decode(TrainReply, content)
        scale = torch.nan if fault == "nan" else 1.0
        state = {k: (scale * t).to(request.model[k].dtype) for k, t in reply.model.items()}
        num_examples = BOAST if fault == "boasts" else reply.num_examples
        return encode(replace(reply, model=state, num_examples=num_examples))

    @app.train()
    @app.evaluate()
    def compute(message: Message, context: Context) -> Message:
        return answer(handle, message, context, config)

    @app.query()
    @app.query("identify")
    def say(message: Message, context: Context) -> Message:
        return fedlibs(message, context)

    return app


def _shorten(text: str) -> str:
    """Return a text of 60 characters at most."""
    return text if len(text) <= END_WIDTH else f"{text[: END_WIDTH - 1]}…"


def _beginning(split: Split, share: float) -> Split:
    end = max(1, round(share * len(split)))
    return replace(split, images=split.images[:end], labels=split.labels[:end])


def _size(message: Message) -> int:
    return count_bytes(message.content) if message.has_content() else 0
