"""The check of notebook 13's main exercise: right means pass, wrong ones hear their mistake."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from course import checks
from fedlib.algorithms.local_training import corrected_gradients
from fedlib.algorithms.scaffold import local_round
from solutions import changed, solution

CODE = solution("13-one", 1)


def exchanged(**pieces: str) -> Any:
    """The notebook's solution with pieces exchanged, which are named."""
    old = {
        "gradient": "g - own_control[n] + control[n]",
        "copy": "p.detach().clone()",
        "divisor": "(num_steps * learning_rate)",
        "moved": "start[name] - p.detach()",
        "result": "own_control[name] - control[name] + used[name]",
        "train": "    train()\n",
        "remove": "        hook.remove()\n",
    }
    names: dict[str, Any] = {"torch": torch}
    exec(changed(CODE, {old[name]: new for name, new in pieces.items()}), names)
    return names["my_round"]


def with_fedlibs_block(model: Any, train: Any, control: Any, own: Any, *k_and_rate: Any) -> Any:
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with corrected_gradients(model, lambda name, p, g: (control[name] - own[name]) + g):
        train()
    k, rate = k_and_rate
    return {
        n: (before[n] - p) / rate / k + (own[n] - control[n]) for n, p in model.named_parameters()
    }


def by_post_accumulate_hooks(
    model: Any, train: Any, control: Any, own: Any, num_steps: int, learning_rate: float
) -> Any:
    """The gradient is changed where it lies, once backward is done with the parameter."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def correct(name: str, p: Any) -> None:
        p.grad.add_(control[name]).sub_(own[name])

    hooks = [
        p.register_post_accumulate_grad_hook(partial(correct, n))
        for n, p in model.named_parameters()
    ]
    train()
    [hook.remove() for hook in hooks]
    with torch.no_grad():
        steps = num_steps * learning_rate
        return {
            n: own[n] - control[n] + (start[n] - p) / steps for n, p in model.named_parameters()
        }


def last_name(
    model: Any, train: Any, control: Any, own: Any, num_steps: int, learning_rate: float
) -> Any:
    hooks = []
    for name, p in model.named_parameters():
        hooks.append(p.register_hook(lambda g: g - own[name] + control[name]))  # noqa: B023
    train()
    for hook in hooks:
        hook.remove()
    return dict(own)


def in_place(
    model: Any, train: Any, control: Any, own: Any, num_steps: int, learning_rate: float
) -> Any:
    new = local_round(model, train, control, own, num_steps, learning_rate)
    for name in own:
        own[name].copy_(new[name])
    return own


RIGHT: dict[str, Callable[..., Any]] = {
    "the notebook's": exchanged(),
    "fedlib's": local_round,
    "fedlib's block": with_fedlibs_block,
    "hooks after accumulation": by_post_accumulate_hooks,
    "one difference": exchanged(gradient="g + (control[n] - own_control[n])"),
}
WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "plain SGD": (exchanged(gradient="g"), "Were the gradients corrected?"),
    "the wrong way round": (
        exchanged(gradient="g + own_control[n] - control[n]"),
        "Which of the two is taken out",
    ),
    "no server": (exchanged(gradient="g - own_control[n]"), "Where is the server's"),
    "no node": (exchanged(gradient="g + control[n]"), "Where is the node's own?"),
    "the last name": (last_name, "its own name"),
    "hooks stay": (exchanged(remove="        pass\n"), "Are the hooks still there?"),
    "trained twice": (exchanged(train="    train()\n    train()\n"), "Who trains the model?"),
    "no copy": (exchanged(copy="p.detach()"), "Was the model copied"),
    "no rate": (exchanged(divisor="num_steps"), "divided by the learning rate too?"),
    "no steps": (exchanged(divisor="learning_rate"), "divided by the number of steps too?"),
    "uphill": (exchanged(moved="p.detach() - start[name]"), "A sign is wrong."),
    "the change": (exchanged(result="used[name] - control[name]"), "Is that the change"),
    "as used": (exchanged(result="used[name]"), "What was put in, and what taken out?"),
    "a list": (lambda *given: list(local_round(*given).values()), "expected 'dict', got 'list'"),
    "in place": (in_place, "it changes its argument"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_round_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.scaffold_round(RIGHT[name], otherwise=local_round) is RIGHT[name]
    assert "right." in capsys.readouterr().out


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_round_hears_its_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = WRONG[name]
    assert checks.scaffold_round(answer, otherwise=local_round) is local_round
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("❌") and word in line
