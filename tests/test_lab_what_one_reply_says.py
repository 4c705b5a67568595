"""The saved results of lab 16: complete, and what a case gives when it is computed anew."""

from typing import Any

import numpy as np
import pytest

from course.labs import RESULTS, SEEDS, load
from course.labs import what_one_reply_says as lab
from fedlib.algorithms.leakage import label_mixture, step_weight, total_variation


@pytest.fixture(scope="module")
def saved() -> Any:
    return load("what_one_reply_says")


def test_every_arm_has_five_seeds(saved: Any) -> None:
    assert saved["seeds"] == list(SEEDS)
    assert len(saved["labels"]) == len(SEEDS)
    assert len({frozenset(entry["distance"]) for entry in saved["labels"]}) == 1
    for arm in lab.IMAGE_ARMS:
        assert [e["seed"] for e in saved["images"] if e["arm"] == arm] == list(SEEDS)
    for arm, values in saved["accuracy"].items():
        assert len(values) == (len(lab.CHOOSING) if arm.startswith("choose") else len(SEEDS))
    assert not set(lab.CHOOSING) & set(SEEDS)


def test_the_file_is_small(saved: Any) -> None:
    assert (RESULTS / "what_one_reply_says.json").stat().st_size < 60_000
    drawn = [entry for entry in saved["images"] if entry["seed"] in lab.DRAWN]
    assert all(lab.unpack(t).shape == (28, 28) for e in drawn for t in e["pictures"].values())


def test_the_guesses_of_one_seed_come_out_anew(saved: Any) -> None:
    splits = [lab.node_split(1, i) for i in range(lab.NUM_NODES)]
    truths = [lab.mixture(split) for split in splits]
    found = np.mean([total_variation(np.full(10, 0.1), truth) for truth in truths])
    assert found == pytest.approx(saved["labels"][0]["distance"]["uniform"], abs=1e-4)


def test_the_formula_on_one_node_comes_out_anew(saved: Any) -> None:
    update = lab.node_update(1, lab.first_model(1), 0)
    num_examples = len(lab.node_split(1, 0))
    weight = lab.weight_of(num_examples)
    assert weight == step_weight(-(-num_examples // 32), 0.05, 0.9)
    found = label_mixture(lab.bias(update), weight)
    wanted = saved["labels"][0]["node 0"]["formula alone"]
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_epsilon_comes_out_anew(saved: Any) -> None:
    assert lab.epsilons() == saved["epsilon"]


def test_pixels_are_packed_and_unpacked() -> None:
    truth = lab.images_of(1)
    assert (lab.unpack(lab.pack(truth.images[0] / 255)) == truth.images[0].numpy()).all()
    assert sorted(set(truth.labels.tolist())) == sorted(truth.labels.tolist())
