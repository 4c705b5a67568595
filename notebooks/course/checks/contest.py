"""The capstone: does a main play by the rules of the contest? It is not graded here."""

from collections import Counter

import torch
from flwr.app import Message

from course.checks.toy import toy_app
from course.contest import ContestGrid, TimeIsUp, Traits, run_main
from course.draw import is_reply
from course.verdict import Answer, check, expect, on_error, watch
from fedlib import CNN, ReplyError, State, state_hash
from fedlib.messages import TRAIN, TrainReply, TrainRequest, decode

FAULTY = {0: "raises", 3: "nan", 6: "rubbish"}
NODES = [Traits(10.0), Traits(12.0), Traits(15.0), Traits(18.0), Traits(15.0, "silent")]
NODES += [Traits(20.0, away=(30.0, 90.0)), Traits(22.0), Traits(200.0), Traits(25.0), Traits(30.0)]
DEFAULT_TTL_S = 43_200  # what Flower gives a message that says none
DEADLINE_S = 240.0
CASE = "10 nodes of which 5 have faults, 240 s"


@check
def contest_main(answer: Answer) -> None:
    """A main that trains, survives the faults of its nodes, and hands in models in time."""
    hashes = []
    for _ in range(2):
        grid = ContestGrid(toy_app(FAULTY), NODES, DEADLINE_S)
        model, ended = _played(answer, grid)
        trains = [m for _, m, _ in grid.history if m.metadata.message_type == TRAIN]
        sent = [message for message in trains if not is_reply(message)]
        if not grid.history and model is None:
            expect(CASE, None, True)  # nothing was done yet
        asked = "nodes" if sent else "nobody"
        expect(f"{CASE}, asked to train", asked, "nodes", "Who learns from images?")
        hint = "It returned without a call of hand_in."
        if not ended:
            hint = "Then the time was up. How long does a wait last, and when is hand_in called?"
        expect(f"{CASE}, handed in", "a model" if model else "nothing", "a model", hint)
        assert model is not None
        trained = "trained" if _differ(model, sent[0]) else "not trained"
        expect(f"{CASE}, the model handed in is", trained, "trained", _complaint(grid))
        longest = max(message.metadata.ttl for message in sent)
        ttl = "12 hours, as nobody set it" if longest >= DEFAULT_TTL_S else "one that was set"
        hint = "Until when may a node still work for you (05)?"
        expect(f"{CASE}, the time-to-live of TRAIN", ttl, "one that was set", hint)
        hashes.append(state_hash(model))
    models = "the same model" if hashes[0] == hashes[1] else "two models"
    expect("the same contest twice", models, "the same model", "From where does chance come?")


def _played(answer: Answer, grid: ContestGrid) -> tuple[State | None, bool]:
    """Return the model handed in last, and whether the main ended by itself."""
    handed_in, reference = list[State](), CNN(torch.Generator()).state_dict()
    hint = "What do you do with a reply that cannot be used?"
    ended = True
    try:
        with on_error((ReplyError, ValueError, KeyError), hint):
            run_main(answer, grid, reference, handed_in)
    except TimeIsUp:
        ended = False
    finally:
        if grid.history:
            watch(grid)
    return (handed_in[-1] if handed_in else None), ended


def _differ(model: State, message: Message) -> bool:
    """Is a model another than the one in a message, by more than half precision rounds?"""
    try:
        sent = decode(TrainRequest, message.content).model
        return any(bool(((model[k] - sent[k].float()).abs() > 1e-3).any()) for k in model)
    except (ReplyError, KeyError):
        return False


def _complaint(grid: ContestGrid) -> str:
    """Ask about what a node that has no fault complained of, if one did, or say what came."""
    replies = [message for _, message, _ in grid.history if is_reply(message)]
    for reply in replies:
        metadata = reply.metadata
        if reply.has_error() and metadata.src_node_id - 2 not in FAULTY:
            return f"Node {metadata.src_node_id} has no fault, and says: {reply.error.reason}."
    came = Counter(_kind(r) for r in replies if r.metadata.message_type == TRAIN)
    what = ", ".join(f"{number} × {kind}" for kind, number in came.most_common()) or "nothing"
    return f"In reply to TRAIN came: {what}. Which of them made it?"


def _kind(reply: Message) -> str:
    """Say what a reply to TRAIN carries: an error, no model, or its dtypes."""
    if reply.has_error():
        return "an error"
    try:
        model = decode(TrainReply, reply.content).model
    except ReplyError:
        return "no model"
    dtypes = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in model.values()}))
    is_finite = all(bool(tensor.isfinite().all()) for tensor in model.values())
    return f"a model in {dtypes}" if is_finite else f"NaN in {dtypes}"
