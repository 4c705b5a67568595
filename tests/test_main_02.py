"""The check of notebook 02's local training: each likely mistake is named, other right ways pass.

An answer is the folded solution with some of its text exchanged.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fedlib
from course import checks
from fedlib import Weighted
from solutions import changed, solution

SOLUTION = solution("02", 2)
ORDER = "order = torch.randperm(len(split), generator=generator)\n"
READY = "split.normalize(fedlib.augment(split.images[order], generator))"
SGD = "torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)"
OPTIMIZER = f"    optimizer = {SGD}\n"
LOOP = "    for _ in range(epochs):\n"
STEP = "            optimizer.step()\n"
CUT = "len(split) // batch_size * batch_size"
ADDED = "loss.item() * len(labels[batch])"
RETURNED = "Weighted(loss_sum, epochs * len(split))"


def built(*changes: tuple[str, str]) -> Any:
    names: dict[str, Any] = {"torch": torch, "F": F, "fedlib": fedlib, "Weighted": Weighted}
    exec(changed(SOLUTION, dict(changes)), names)
    return names["my_train"]


def verdict(answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    assert checks.local_training(answer, otherwise=fedlib.train) in (answer, fedlib.train)
    line, uses = capsys.readouterr().out.splitlines()
    assert uses == f"   The cells below use {'yours' if line[0] == '✅' else 'ours'}."
    return str(line)


WRONG: dict[str, tuple[list[tuple[str, str]], str]] = {
    "no return": ([(f"    return {RETURNED}", "")], "Is there a `return`?"),
    "a float": ([(RETURNED, "loss_sum")], "expected 'Weighted', got 'float'"),
    "a global order": ([(ORDER, "order = torch.randperm(len(split))\n")], "without being given"),
    "seeded inside": ([(ORDER, f"generator.manual_seed(42)\n        {ORDER}")], "Its seed belongs"),
    "no chance at all": (
        [(ORDER, "order = torch.arange(len(split))\n"), (READY, "split.normalize(split.images)")],
        "expected 'used', got 'unused'",
    ),
    "a copy": (
        [("    model.train()\n", "    import copy; model = copy.deepcopy(model)\n")],
        "or a copy of it?",
    ),
    "the last batch dropped": ([("0, len(split), batch", f"0, {CUT}, batch")], "left over"),
    "one epoch": ([("range(epochs)", "range(1)")], "How many epochs"),
    "the course's batch size": (
        [("size):\n", "size):\n".replace("size", "size * 4"))],
        "Where does",
    ),
    "no order": ([("split.images[order]", "split.images")], "order in which they were given"),
    "an order after the crops": (
        [
            (ORDER, f"images = fedlib.augment(split.images, generator)\n        {ORDER}"),
            (READY, "split.normalize(images[order])"),
        ],
        "an order drawn after the crops",
    ),
    "crops before the order": (
        [(READY, "split.normalize(fedlib.augment(split.images, generator)[order])")],
        "cropped before they were put in order",
    ),
    "crops batch by batch": (
        [
            (READY, "split.images[order]"),
            (
                "model(images[batch])",
                "model(split.normalize(fedlib.augment(images[batch], generator)))",
            ),
        ],
        "cropped batch by batch",
    ),
    "no crops": ([(READY, "split.normalize(split.images[order])")], "but not cropped"),
    "bytes": ([(READY, "fedlib.augment(split.images[order], generator).unsqueeze(1)")], "uint8"),
    "divided by 255": (
        [(READY, "fedlib.augment(split.images[order], generator).float().unsqueeze(1) / 255")],
        "divided by 255",
    ),
    "one order for all epochs": (
        [(f"        {ORDER}", ""), (LOOP, f"    {ORDER}{LOOP}")],
        "in the first epoch's order",
    ),
    "the same images twice": (
        [
            (f"        {ORDER}        images = {READY}\n", ""),
            (LOOP, f"    {ORDER}    images = {READY}\n{LOOP}"),
        ],
        "those of the first epoch",
    ),
    "the mode for evaluation": ([("    model.train()\n", "")], "mode for evaluation"),
    "no step": ([(STEP, "")], "Whose parameters"),
    "zero before the step": ([(STEP, f"            optimizer.zero_grad()\n{STEP}")], "Whose param"),
    "no zero": ([("            optimizer.zero_grad()\n", "")], "gradients that are there already"),
    "an optimizer an epoch": (
        [(OPTIMIZER, ""), (LOOP, f"{LOOP}    {OPTIMIZER}")],
        "How long does an optimizer remember",
    ),
    "no momentum": ([(", momentum=momentum", "")], "momentum was not used"),
    "the course's numbers": (
        [(SGD, SGD.replace("=learning_rate", "=0.05"))],
        "the learning rate come",
    ),
    "labels as they were": ([("split.labels[order]", "split.labels")], "And their labels?"),
    "the sum of losses": (
        [("labels[batch])\n            opt", 'labels[batch], reduction="sum")\n            opt')],
        "or their mean?",
    ),
    "Adam": ([(SGD, "torch.optim.Adam(model.parameters())")], "one step for each batch"),
    "weighted by one epoch": ([("epochs * len(split)", "len(split)")], "Is it over every epoch?"),
    "weighted by batches": ([("epochs * len(split)", "6")], "a batch count, or an example"),
    "a tensor": ([("loss.item()", "loss.detach()")], "a number of a tensor"),
    "means added": ([(ADDED, "loss.item()")], "How many images does it stand for?"),
    "the mean": ([(RETURNED, "Weighted(loss_sum / 40, epochs * len(split))")], "This is the mean."),
    "every batch alike": ([(ADDED, "loss.item() * batch_size")], "has the last batch"),
    "written for the first case": (
        [("0, len(split), batch_size", "0, len(split), 8"), ("start + batch_size", "start + 8")],
        "again with",
    ),
}

RIGHT: dict[str, list[tuple[str, str]]] = {
    "as it is": [],
    "the batches cut by split": [
        (
            "for start in range(0, len(split), batch_size)",
            "for batch in torch.arange(20).split(batch_size)",
        ),
        ("            batch = slice(start, start + batch_size)\n", ""),
    ],
    "normalised batch by batch": [
        (READY, "fedlib.augment(split.images[order], generator)"),
        ("model(images[batch])", "model(split.normalize(images[batch]))"),
    ],
    "zero after the step": [
        ("            optimizer.zero_grad()\n", ""),
        (STEP, f"{STEP}            model.zero_grad()\n"),
    ],
    "a layer of its own for the loss": [("F.cross_entropy(", "torch.nn.CrossEntropyLoss()(")],
    "the weight counted": [
        ("    loss_sum = 0.0\n", "    loss_sum, n = 0.0, 0\n"),
        (ADDED, f"{ADDED}\n            n += len(labels[batch])"),
        (RETURNED, "Weighted(sum=loss_sum, weight=n)"),
    ],
    "forward by name": [("model(images[batch])", "model.forward(images[batch])")],
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_likely_mistake_is_named(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, word = WRONG[mistake]
    line = verdict(built(*changes), capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("way", RIGHT)
def test_a_right_answer_may_look_otherwise(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(built(*RIGHT[way]), capsys) == "✅ my_train: right."


def test_weights_that_are_equal_but_for_their_last_bits_are_told_from_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rounds_otherwise(model: Any, *given: Any, **named: Any) -> Weighted:
        loss = fedlib.train(model, *given, **named)
        with torch.no_grad():
            model.fc2.bias.add_(1e-8)
        return loss

    assert "the same but for their last bits" in verdict(rounds_otherwise, capsys)


def test_it_is_checked_on_one_thread_whatever_the_notebook_uses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def count(*given: Any, **named: Any) -> Weighted:
        seen.append(torch.get_num_threads())
        return fedlib.train(*given, **named)

    before = torch.get_num_threads()
    verdict(count, capsys)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
