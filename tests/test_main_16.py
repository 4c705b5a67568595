"""The check of notebook 16's private mean: each likely mistake is named, other right ways pass.

An answer is the folded solution with some of its text exchanged.
"""

from typing import Any

import pytest
import torch

from course import checks
from fedlib.algorithms import privacy
from solutions import changed, solution

SOLUTION = solution("16", 1)
FACTOR = "factor = 1.0 if norm <= clip else clip / norm"
NORM = "norm = sum(float(tensor.square().sum()) for tensor in update.values()) ** 0.5"
STD = "private.noise_multiplier * private.clip / private.expected"
NOISE = "noise = torch.randn(tensor.shape, generator=generator)"
MEAN = "total / private.expected + std * noise"
SHORT = "[clipped(update, private.clip) for update in updates]"
ITEMS = "short[0].items()"


def built(*changes: tuple[str, str]) -> Any:
    names: dict[str, Any] = {"torch": torch, "privacy": privacy}
    exec(changed(SOLUTION, dict(changes)), names)
    return names["my_private_mean"]


def verdict(answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    reference = privacy.private_mean
    assert checks.private_mean(answer, otherwise=reference) in (answer, reference)
    line, uses = capsys.readouterr().out.splitlines()
    assert uses == f"   The cells below use {'yours' if line[0] == '✅' else 'ours'}."
    return str(line)


PER_TENSOR = "{k: clipped({k: update[k]}, private.clip)[k] for k in update} for update in updates"
WRONG: dict[str, tuple[list[tuple[str, str]], str]] = {
    "no return": ([("    return mean", "")], "Is there a `return`?"),
    "not clipped": ([(SHORT, "list(updates)")], "Was the first update clipped?"),
    "a norm for each tensor": ([(SHORT, f"[{PER_TENSOR}]")], "or one of each?"),
    "values limited": (
        [(SHORT, "[{k: x.clamp(-4, 4) for k, x in u.items()} for u in updates]")],
        "and not the norm?",
    ),
    "all as long as the clip": (
        [(FACTOR, "factor = clip / norm if norm else 1.0")],
        "become longer?",
    ),
    "too long left out": (
        [(FACTOR, "factor = 1.0 if norm <= clip else 0.0")],
        "left out?",
    ),
    "zeros": ([(FACTOR, "factor = min(1.0, clip / norm)")], "an update of zeros?"),
    "the number that came": ([(MEAN, "total / len(updates) + std * noise")], "that came?"),
    "the sum": ([(MEAN, "total + std * noise")], "That is the sum."),
    "no noise": ([(MEAN, "total / private.expected")], "Where is the noise?"),
    "the sum's noise": ([(STD, "private.noise_multiplier * private.clip")], "By what?"),
    "without the clip": ([(STD, "private.noise_multiplier / private.expected")], "What has the"),
    "that came, in the noise": (
        [(STD, "private.noise_multiplier * private.clip / len(updates)")],
        "divided by the number that came.",
    ),
    "one draw a tensor": (
        [(NOISE, "noise = torch.randn(1, generator=generator)")],
        "one draw for a whole tensor?",
    ),
    "a global generator": ([(NOISE, "noise = torch.randn(tensor.shape)")], "Does `generator`"),
    "anew for each tensor": (
        [(NOISE, "noise = torch.randn(tensor.shape, generator=generator.manual_seed(16))")],
        "begin anew.",
    ),
    "backwards": ([(ITEMS, "reversed(short[0].items())")], "In which order"),
    "another dtype": ([(MEAN, f"({MEAN}).double()")], "or another dtype used?"),
    "in place": (
        [(SHORT, "[{k: x.mul_(0.5) for k, x in u.items()} for u in updates]")],
        "it changes its argument",
    ),
}


@pytest.mark.parametrize("slip", WRONG)
def test_a_mistake_is_named(slip: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, wanted = WRONG[slip]
    line = verdict(built(*changes), capsys)
    assert line.startswith("❌")
    assert wanted in line


RIGHT: dict[str, list[tuple[str, str]]] = {
    "as it stands": [],
    "noise on the sum": [
        (MEAN, "(total + private.noise_multiplier * private.clip * noise) / private.expected")
    ],
    "one long vector": [
        (NORM, "norm = float(torch.cat([x.flatten() for x in update.values()]).norm())")
    ],
    "stacked": [
        (
            "total = sum(update[name] for update in short)",
            "total = torch.stack([u[name] for u in short]).sum(0)",
        )
    ],
    "the generator's own normal": [
        (NOISE, "noise = torch.empty_like(tensor).normal_(generator=generator)")
    ],
    "fedlib's pieces": [(SHORT, "[privacy.clip_update(u, private.clip) for u in updates]")],
    "a tensor's minimum": [
        (FACTOR, "factor = float(torch.clamp(clip / torch.tensor(norm), max=1.0))")
    ],
}


@pytest.mark.parametrize("way", RIGHT)
def test_other_right_ways_pass(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "right." in verdict(built(*RIGHT[way]), capsys)
