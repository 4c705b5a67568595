"""Notebook 13: a node of SCAFFOLD, on losses whose every step is exact in float32."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course.verdict import Answer, check, expect, on_error
from fedlib.algorithms.scaffold import LocalRound, local_round
from fedlib.model import state_hash

# Powers of two and few digits: whatever the order of the sums, the same bits come out.
START = {"left": [1.0, -2.0], "right": [0.5, 3.0]}
MINIMUM = {"left": [3.0, 0.5], "right": [-1.0, 2.0]}
CURVATURE = {"left": 1.0, "right": 2.0}
CONTROL = {"left": [0.5, -1.0], "right": [2.0, 0.25]}
OWN = {"left": [-1.5, 0.75], "right": [0.5, -2.0]}
CASES = ((2, 0.25), (4, 0.5))  # steps and learning rate


class _Toy(nn.Module):
    """Two parameters, each with a quadratic loss; it counts its trainings."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.tensor(START["left"]))
        self.right = nn.Parameter(torch.tensor(START["right"]))
        self.num_trained = 0

    def backward(self) -> None:
        self.zero_grad()
        total = torch.zeros(())
        for name, p in self.named_parameters():
            total = total + CURVATURE[name] / 2 * (p - torch.tensor(MINIMUM[name])).square().sum()
        total.backward()  # type: ignore[no-untyped-call]

    def gradients(self) -> dict[str, Any]:
        self.backward()
        found = ((name, p.grad) for name, p in self.named_parameters())
        return {name: gradient.tolist() for name, gradient in found if gradient is not None}

    def train_for(self, num_steps: int, learning_rate: float) -> None:
        self.num_trained += 1
        optimizer = torch.optim.SGD(self.parameters(), lr=learning_rate)
        for _ in range(num_steps):
            self.backward()
            optimizer.step()


def _values(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(tensor).detach().clone() for name, tensor in state.items()}


def _tensors(state: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in state.items()}


def _trained(correct: Callable[[str, Tensor], Tensor], case: tuple[int, float]) -> dict[str, Any]:
    """Return the model that comes out where ``correct`` changes the gradients."""
    toy = _Toy()
    for name, p in toy.named_parameters():
        p.register_hook(partial(correct, name))  # type: ignore[no-untyped-call]
    toy.train_for(*case)
    return {name: tensor.tolist() for name, tensor in toy.state_dict().items()}


@check
def scaffold_round(answer: Answer) -> None:
    """A node's round of SCAFFOLD: what it makes of the model, and its next control variate."""
    control, own = _tensors(CONTROL), _tensors(OWN)
    for case in CASES:
        where = f"{case[0]} steps with {case[1]:g}"
        toy, right = _Toy(), _Toy()
        wanted = _run(local_round, right, case)
        with on_error(RuntimeError, "Do a parameter and its correction have the same name?"):
            got = _run(answer, toy, case)
        if got is None or got is ...:
            expect(f"{where}, what it returns", None if toy.num_trained else got, "")
        expect(f"{where}, how often it called train()", toy.num_trained, 1, "Who trains the model?")
        ends = {name: tensor.tolist() for name, tensor in right.state_dict().items()}
        mine = {name: tensor.tolist() for name, tensor in toy.state_dict().items()}
        slips: dict[str, Any] = {
            "Were the gradients corrected? The hooks must be there before it trains.": _trained(
                lambda name, g: g, case
            ),
            "Which of the two is taken out, and which put in?": _trained(
                lambda name, g: g + own[name] - control[name], case
            ),
            "Where is the server's control variate?": _trained(lambda name, g: g - own[name], case),
            "Where is the node's own?": _trained(lambda name, g: g + control[name], case),
            "Are both put in?": _trained(lambda name, g: g + own[name] + control[name], case),
            "Does each hook remember its own name? A loop's variable is read when a hook is "
            "called, and has its last value by then.": _trained(
                lambda name, g: g - own["right"] + control["right"], case
            ),
        }
        hint = "What does SGD see in place of the gradient?"
        expect(f"{where}, the trained model", mine, ends, hint, slips)
        _expect_control(where, got, wanted, ends, case)
        right.load_state_dict(toy.state_dict())
        question = f"{where}, the model's gradients afterwards"
        expect(question, toy.gradients(), right.gradients(), "Are the hooks still there?")


def _run(answer: LocalRound | Answer, toy: _Toy, case: tuple[int, float]) -> Any:
    train = partial(toy.train_for, *case)
    return answer(toy, train, _tensors(CONTROL), _tensors(OWN), *case)


def _expect_control(
    where: str, got: Any, wanted: Any, ends: Mapping[str, Any], case: tuple[int, float]
) -> None:
    """Compare the node's next control variate with fedlib's: its numbers, then its bits."""
    kind = "dict" if isinstance(got, dict) else type(got).__name__
    expect(f"{where}, what it returns", kind, "dict", "A tensor for each name?")
    control, own, start, end = (_tensors(state) for state in (CONTROL, OWN, START, ends))
    num_steps, rate = case
    moved = {name: start[name] - end[name] for name in start}

    def otherwise(make: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {name: make(name) for name in start}

    slips = {
        "Was the model copied before it was trained?": otherwise(lambda k: own[k] - control[k]),
        "Is it divided by the learning rate too?": otherwise(
            lambda k: own[k] - control[k] + moved[k] / num_steps
        ),
        "Is it divided by the number of steps too?": otherwise(
            lambda k: own[k] - control[k] + moved[k] / rate
        ),
        "From where to where? A sign is wrong.": otherwise(
            lambda k: own[k] - control[k] - moved[k] / (num_steps * rate)
        ),
        "Is that the change of the control variate?": otherwise(
            lambda k: -control[k] + moved[k] / (num_steps * rate)
        ),
        "That is the mean of the corrected gradients. What was put in, and what taken out?": (
            otherwise(lambda k: moved[k] / (num_steps * rate))
        ),
    }
    hint = "The mean of the plain gradients: what did the correction add to each?"
    question = f"{where}, the node's next control variate"
    expect(question, _values(got), _values(wanted), hint, slips)
    expect(f"{question}, its hash", state_hash(_values(got))[:8], state_hash(_values(wanted))[:8])
