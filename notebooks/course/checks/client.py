"""Notebook 04: the ClientApp."""

import inspect
import itertools
import random

import numpy as np
import torch
from flwr.app import Context, RecordDict

from course.verdict import Answer, check, elsewhere, expect, on_error


@check
def remember_lowest(answer: Answer) -> None:
    """The lowest loss of a node, kept in its state."""
    home, other = (Context(1, node, {"partition-id": node}, RecordDict(), {}) for node in (7, 8))
    for loss, wanted in ((2.0, 2.0), (1.5, 1.5), (1.8, 1.5)):
        with on_error(KeyError, "What does a node remember before its first loss?"):
            got = answer(home, loss)
        kept = got is None and "memory" in home.state
        expect("kept but not returned", kept, False, "What does the caller get?")
        expect(f"losses 2.0, 1.5, 1.8, at {loss}", got, wanted, "What came before?")
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
