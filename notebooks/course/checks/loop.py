"""Notebooks 08 and 09: the round loop, and what may be changed about it."""

import torch

from course.verdict import Answer, check, expect, on_error


@check
def cosine_rate(answer: Answer) -> None:
    """The cosine schedule, as a pure function of the round."""
    for server_round, wanted in ((1, 0.2), (9, 0.02), (5, 0.11), (3, 0.1736396103)):
        question, hint = f"round {server_round} of 9 from 0.2", "What is p in this round?"
        expect(question, answer(server_round, 9, 0.2), wanted, hint)
    with on_error(ZeroDivisionError, "That was round 1 of 1, from 0.2. What is p there?"):
        expect("the only round of a run, from 0.2", answer(1, 1, 0.2), 0.2)


@check
def flattering_nodes(answer: Answer) -> None:
    """Three nodes whose plain mean accuracy is far above the weighted one."""
    nodes = answer()
    expect("how many nodes", nodes if nodes in (None, ...) else len(nodes), 3)
    whole = all(number == int(number) for node in nodes for number in node)
    expect("num_correct and num_examples are counts", whole, True, "How many, of how many?")
    expect("0 <= num_correct <= num_examples > 0", all(0 <= c <= n > 0 for c, n in nodes), True)
    gap = sum(c / n for c, n in nodes) / 3 - sum(c for c, _ in nodes) / sum(n for _, n in nodes)
    got = "at least 0.2" if gap > 0.2 - 1e-9 else f"{gap:.4f}"
    expect("each node once - weighted", got, "at least 0.2", "Which node is large?")


@check
def momentum_step(answer: Answer) -> None:
    """FedAvgM's step on the server."""
    model, mean, old = ({"w": torch.tensor([v])} for v in (1.0, 3.0, 6.0))
    came = answer(model, mean, old, 0.5)
    case = "model 1, mean 3, old velocity 6, beta 0.5"
    two = came if came in (None, ...) else isinstance(came, (tuple, list)) and len(came) == 2
    expect("two dictionaries are returned", two, True, "The new model, and what else?")
    slips = {
        "The change has the wrong sign.": {"w": [1.0]},
        "The old velocity is missing.": {"w": [2.0]},
        "The change is missing.": {"w": [3.0]},
    }
    hint = "All of the change, from model to mean?"
    expect(f"{case}, velocity", came[1], {"w": [5.0]}, hint, slips)
    slips = {
        "That is the velocity alone: the model is missing.": {"w": [5.0]},
        "It goes against the velocity: a sign is wrong.": {"w": [-4.0]},
    }
    hint = "From where does the velocity lead?"
    expect(f"{case}, new model", came[0], {"w": [6.0]}, hint, slips)
