"""The capstone: does a main play by the rules of the contest? It is not graded here."""

import torch
from flwr.app import Message

from course.checks.toy import toy_app
from course.contest import ContestGrid, TimeIsUp, Traits, run_main
from course.verdict import Answer, check, expect, on_error, watch
from fedlib import CNN, ReplyError, State, state_hash
from fedlib.messages import TRAIN, TrainRequest, decode

FAULTY = {0: "raises", 1: "nan", 2: "rubbish"}
NODES = [Traits(10.0), Traits(12.0), Traits(15.0), Traits(15.0, "silent"), Traits(200.0)]
NODES += [Traits(18.0), Traits(20.0, away=(30.0, 90.0)), Traits(22.0), Traits(25.0), Traits(30.0)]
DEADLINE_S = 240.0
CASE = "10 nodes of which 5 have faults, 240 s"


@check
def contest_main(answer: Answer) -> None:
    """A main that trains, survives the faults of its nodes, and hands in models in time."""
    hashes = []
    for _ in range(2):
        grid = ContestGrid(toy_app(FAULTY), NODES, DEADLINE_S)
        model, ended = _played(answer, grid)
        sent = [message for _, message, _ in grid.history if message.metadata.message_type == TRAIN]
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
    """Ask about what a node that has no fault complained of, if one did."""
    for _, reply, _ in grid.history:
        metadata = reply.metadata
        if reply.has_error() and metadata.src_node_id - 2 not in FAULTY:
            return f"Node {metadata.src_node_id} has no fault, and says: {reply.error.reason}."
    return "Whose replies made it?"
