"""Notebook 04: the ClientApp."""

import inspect
import itertools
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedlib
from course.verdict import Answer, check, elsewhere, expect, on_error
from fedlib import CNN, Config, LocalGrid, Stream, clone_state, messages, state_hash
from fedlib.errors import one_line
from fedlib.messages import TrainReply, TrainRequest
from fedlib.training import single_thread

PARTITIONS = 30, 3  # of fifty, with this seed: those with the fewest images
RunConfig = dict[str, bool | float | int | str]
RUN_CONFIG: RunConfig = {
    "seed": 16,
    "local-epochs": 2,
    "batch-size": 16,
    "momentum": 0.5,
    "learning-rate": 0.2,
}
ANOTHER: RunConfig = RUN_CONFIG | {"local-epochs": 3, "batch-size": 24, "momentum": 0.7}


@check
def remember_lowest(answer: Answer) -> None:
    """The lowest loss of a node, kept in its state."""
    home, other = (Context(1, node, {"partition-id": node}, RecordDict(), {}) for node in (7, 8))
    for loss, wanted in ((12.0, 12.0), (1.5, 1.5), (1.8, 1.5)):
        with on_error(KeyError, "What does a node remember before its first loss?"):
            got = answer(home, loss)
        kept = got is None and "memory" in home.state
        expect("kept but not returned", kept, False, "What does the caller get?")
        hint = "Which losses has this node seen up to here?"
        expect(f"losses 12.0, 1.5, 1.8, at {loss}", got, wanted, hint)
    expect("another node, its first loss 3.0", answer(other, 3.0), 3.0, "Whose memory is it?")
    expect("what is kept", dict(home.state.get("memory", {})), {"lowest-loss": 1.5})


@check
def node_generator(answer: Answer) -> None:
    """A generator for each seed, round and partition."""

    def shared() -> dict[str, str]:
        states = torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()
        return dict(zip(("torch's", "NumPy's", "random's"), map(repr, states), strict=True))

    def draw(*who: int) -> tuple[float, ...]:
        if (generator := answer(*who)) in (None, ...):
            raise NotImplementedError
        return tuple(torch.rand(3, generator=generator).tolist())

    before = shared()
    expect("seed 42, round 1, partition 12, twice", draw(42, 1, 12), draw(42, 1, 12))
    for name, state in shared().items():
        touched, hint = state != before[name], "Who else draws from it?"
        expect(f"{name} global generator was touched", touched, False, hint)
    seen: dict[tuple[float, ...], tuple[int, ...]] = {}
    bases = (100, 256, 1000, 10**4, 2**16)  # where a sum of multiples begins to collide
    numbers = [*range(1, 13), *bases, *(base + 1 for base in bases)]
    for who in itertools.product((42, 43), numbers, (0, *numbers)):
        twin = seen.setdefault(draw(*who), who)
        hint = "What tells them apart? (PyTorch's CPU generator uses the lower 32 bits of a seed.)"
        expect(f"{who} and {twin} share their chance", twin != who, False, hint)
    hint = "What of it does each process choose anew?"
    own = inspect.unwrap(answer)
    again = elsewhere(lambda: torch.rand(3, generator=own(42, 1, 12)).tolist())
    expect("seed 42, round 1, partition 12, in another process", again, draw(42, 1, 12), hint)


@check
def handle_train(answer: Answer) -> None:
    """The reply to TRAIN: fedlib's bits on a LocalGrid, and an error where nothing can be used."""
    here, there = PARTITIONS
    state = clone_state(CNN(torch.Generator().manual_seed(4)))
    request = TrainRequest(state, 1, fedlib.data.FASHION_MNIST, 0.05)
    with single_thread():
        replies = [
            _compare(answer, request, here),
            _compare(answer, request, there),
            _compare(answer, replace(request, server_round=2, learning_rate=0.02), here, ANOTHER),
        ]
        again = _short_hash(_ask(answer, request, here))
        hint = "What did it keep from the messages before?"
        expect("the first message once more, weights", again, _short_hash(replies[0]), hint)
        for question, content, hint in _unusable(request):
            expect(question, _outcome(answer, content), "a FedlibError or an Error reply", hint)


def _compare(
    own: Answer, request: TrainRequest, partition_id: int, run_config: RunConfig = RUN_CONFIG
) -> TrainReply:
    """Let the answer and fedlib's app reply to the same message; expect the same of both."""
    case = f"partition {partition_id}, round {request.server_round}, rate {request.learning_rate}"
    apps = own, fedlib.make_client_app()
    got, wanted = (_ask(app, request, partition_id, run_config) for app in apps)
    settings = Config.from_run_config(run_config)
    validation = len(_load(request, partition_id, settings.seed).validation)
    usual = len(_load(request, partition_id, Config().seed).train)
    slips: dict[str, Any] = {
        "Each epoch's are counted: does an image count more than once?": wanted.loss_weight,
        "Was the validation split trained on too?": wanted.num_examples + validation,
        "That is the size of the validation split. Which was trained on?": validation,
        "That is partition and split of the default seed. Which one does the Context say?": usual,
    }
    hint = "Which images were trained on?"
    expect(f"{case}: num_examples", got.num_examples, wanted.num_examples, hint, slips)
    if (came := _short_hash(got)) != _short_hash(wanted):
        slips = dict(_wrong_weights(request, partition_id, settings))
        hint = "Which of data, model, options and generator is another than the text says?"
        expect(f"{case}: weights", came, _short_hash(wanted), hint, slips)
    slips = {"That is the mean. What travels?": wanted.loss_sum / wanted.loss_weight}
    hint = "What does `train` return?"
    expect(f"{case}: loss_sum", got.loss_sum, wanted.loss_sum, hint, slips)
    hint = "Over how many images of how many epochs is the sum?"
    expect(f"{case}: loss_weight", got.loss_weight, wanted.loss_weight, hint)
    return got


def _ask(
    own: Answer, request: TrainRequest, partition_id: int, run_config: RunConfig = RUN_CONFIG
) -> TrainReply:
    """Send TRAIN to a node of a LocalGrid; return its reply, if it has the form of one."""
    seen: dict[str, Any] = {}

    def noted(message: Message, context: Context) -> Any:
        seen["before"] = deepcopy(message.content), deepcopy(context.state)
        try:
            seen["reply"] = own(message, context)
        except Exception as error:
            seen["raised"] = error
        seen["after"] = message.content, context.state
        return seen.get("reply")

    app = ClientApp()
    app.train()(noted)
    grid = LocalGrid(app, 50, run_config)
    message = Message(messages.encode(request), partition_id + 2, "train", ttl=600)
    (message_id,) = grid.push_messages([message])
    came = list(grid.pull_messages([message_id]))
    if "raised" in seen:
        raise seen["raised"]
    if (reply := seen["reply"]) is ...:
        raise NotImplementedError
    hint = "What must a handler hand back?"
    expect("what it returns", type(reply).__name__, "Message", hint)
    changes = [after != before for after, before in zip(seen["after"], seen["before"], strict=True)]
    expect("the content that came was changed", changes[0], False, "Who may still read it?")
    hint = "What may it remember between two messages?"
    expect("the Context's state was changed", changes[1], False, hint)
    hint = "Is it made as the reply to this message?"
    answered = [r.metadata.reply_to_message_id for r in came]
    expect("to which messages it is a reply", answered, [message_id], hint)
    reason = reply.error.reason if reply.has_error() else ""
    expect("the error in reply to a good message", reason, "", "What could not be used?")
    with on_error(fedlib.ReplyError, "Which dataclass is the reply, and what encodes it?"):
        return messages.decode(TrainReply, reply.content)


def _wrong_weights(
    request: TrainRequest, partition_id: int, settings: Config
) -> Iterator[tuple[str, str]]:
    """Name likely mistakes, with the weights that they give."""
    seed, server_round = settings.seed, request.server_round
    data = _load(request, partition_id, seed)
    options = _options(settings) | {"learning_rate": request.learning_rate}
    usual, fixed = _options(Config()), _options(Config.from_run_config(RUN_CONFIG))

    def generator(
        server_round: int = server_round, number: int = partition_id, seed: int = seed
    ) -> torch.Generator:
        return fedlib.torch_generator(seed, server_round, number, Stream.TRAIN)

    def trained(change: dict[str, Any], chance: Any = None, split: Any = data.train) -> str:
        model = CNN(torch.Generator())
        model.load_state_dict(request.model)
        fedlib.train(model, split, generator=chance or generator(), **options | change)
        return state_hash(model.state_dict())[:12]

    yield "Those are the weights that came. What did the training change?", _short_hash(request)
    text = "That is the config's learning rate. Which one did the server send?"
    yield text, trained({"learning_rate": settings.learning_rate})
    text = "Those are the default options. What does the run config of this Context say?"
    yield text, trained(usual)
    text = "Those are the default options, and the config's learning rate. Who says which?"
    yield text, trained(usual | {"learning_rate": settings.learning_rate})
    for name in usual:
        text = f"{name} is not as the run config of this Context says."
        yield text, trained({name: usual[name]})
        yield f"{text} It was right before.", trained({name: fixed[name]})
    text = "The generator has another seed. Which one does the run config of this Context say?"
    yield text, trained({}, generator(seed=Config().seed))
    text = "The generator has another round. Which one did the server send?"
    yield text, trained({}, generator(1))
    text = "The generator has the node's id. Which number stays the same from run to run?"
    yield text, trained({}, generator(number=partition_id + 2))
    yield "The generator is not made of seed, round and partition.", trained({}, torch.Generator())
    yield "It trains on the validation split.", trained({}, split=data.validation)


def _unusable(request: TrainRequest) -> Iterator[tuple[str, RecordDict, str]]:
    """Messages that a node cannot use, each with a question."""
    state, last = dict(request.model), "fc2.bias"
    sick = state | {last: torch.full_like(state[last], torch.nan)}
    short = {name: tensor for name, tensor in state.items() if name != last}
    yield "a message without content", RecordDict(), "Which piece reads it, and refuses it?"
    hint = "Which piece looks at a model before it is used?"
    for question, wrong in (("a model without its last bias", short), ("a model with NaNs", sick)):
        yield question, messages.encode(replace(request, model=wrong)), hint
    hint = "Whose data set does it open?"
    yield "a data set that is not there", messages.encode(replace(request, dataset="none")), hint


def _outcome(own: Answer, content: RecordDict) -> str:
    """Say what came of a message that cannot be used."""
    node_id = PARTITIONS[0] + 2
    context = LocalGrid(ClientApp(), 50, RUN_CONFIG).contexts[node_id]
    try:
        reply = own(Message(content, node_id, "train", ttl=600), context)
    except fedlib.FedlibError:
        return "a FedlibError or an Error reply"
    except Exception as error:
        return one_line(f"{type(error).__name__}: {error}")[:80]
    if isinstance(reply, Message) and reply.has_error():
        return "a FedlibError or an Error reply"
    return "a reply as if all were well"


def _options(settings: Config) -> dict[str, Any]:
    names = {"epochs": "local_epochs", "batch_size": "batch_size", "momentum": "momentum"}
    return {option: getattr(settings, name) for option, name in names.items()}


def _load(request: TrainRequest, partition_id: int, seed: int) -> fedlib.Partition:
    dataset = fedlib.open_dataset(request.dataset)
    return fedlib.load_partition(dataset, 50, Config().dirichlet_alpha, seed, partition_id)


def _short_hash(message: TrainRequest | TrainReply) -> str:
    return state_hash(message.model)[:12]
