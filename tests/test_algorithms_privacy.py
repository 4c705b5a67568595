"""Private rounds: clipping and noise against Flower's own, epsilon against another accountant."""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from scipy.stats import norm

from apps import NUM_NODES, make_config
from fedlib import (
    ConfigError,
    LocalGrid,
    ReplyError,
    enter_local_run,
    make_client_app,
    messages,
    state_hash,
)
from fedlib.algorithms.messages import TRAIN_PRIVATE, PrivateReply, PrivateRequest
from fedlib.algorithms.privacy import (
    Privacy,
    add_noise,
    clip_update,
    difference,
    epsilon,
    epsilon_of_replies,
    handle_private_train,
    noise_generator,
    poisson_sample,
    private_mean,
    run_private,
    update_norm,
)
from fedlib.client_app import answer
from fedlib.config import Config
from fedlib.model import CNN, State

CONTEXT = Context(1, 2, {}, RecordDict(), {})


def state(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (200, 150), "b": (150,)}
    return {k: size * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def arrays(values: State) -> ArrayRecord:
    return ArrayRecord({k: Array(tensor.numpy()) for k, tensor in values.items()})


def std_of(values: State) -> float:
    return float(torch.cat([x.flatten() for x in values.values()]).std())


def after_mod(mod: Any, before: State, after: State, **config: float) -> State:
    """Return the model that one of Flower's mods makes of a node's."""
    enter_local_run()
    content = RecordDict({"model": arrays(before), "config": ConfigRecord({**config})})
    message = Message(content, 2, "train")

    def node(message: Message, context: Context) -> Message:
        return Message(RecordDict({"model": arrays(after)}), reply_to=message)

    reply = mod(message, CONTEXT, node).content
    return dict(reply.array_records["model"].to_torch_state_dict())


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_an_update_is_clipped_as_by_flowers_mod(clip: float) -> None:
    before, after = state(1), state(2)
    theirs = difference(after_mod(fixedclipping_mod, before, after, clipping_norm=clip), before)
    ours = clip_update(difference(after, before), clip)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert update_norm(ours) == pytest.approx(min(clip, update_norm(difference(after, before))))


def test_a_nodes_noise_has_the_deviation_of_flowers_local_mod() -> None:
    before, after, clip, multiplier, delta = state(1), state(2), 2.0, 0.25, 1e-5
    budget = math.sqrt(2 * math.log(1.25 / delta))  # the epsilon at which their deviation is 1
    mod = LocalDpMod(clip, multiplier * clip, budget, delta)
    clipped = clip_update(difference(after, before), clip)
    theirs = difference(difference(after_mod(mod, before, after), before), clipped)
    noised = add_noise(clipped, multiplier * clip, noise_generator(1, 1, 0))
    ours = difference(noised, clipped)
    assert std_of(theirs) == pytest.approx(0.5, rel=0.02)
    assert std_of(ours) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_mean_is_that_of_flowers_strategy_if_all_weigh_the_same(noise: float) -> None:
    enter_local_run()
    model, clip, number = state(1), 3.0, 4
    nodes = [state(10 + i) for i in range(number)]
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(weighted_by_key="n"), noise, clip, number
    )
    strategy.current_arrays = arrays(model)
    replies = [
        Message(
            RecordDict({"model": arrays(after), "metrics": MetricRecord({"n": 5})}),
            reply_to=Message(RecordDict(), 2 + i, "train"),
        )
        for i, after in enumerate(nodes)
    ]
    mean, _ = strategy.aggregate_train(1, replies)
    assert mean is not None
    theirs = difference(dict(mean.to_torch_state_dict()), model)
    updates = [difference(after, model) for after in nodes]
    ours = private_mean(updates, Privacy(clip, noise, number), noise_generator(1, 1, -1))
    clean = private_mean(updates, Privacy(clip, 0.0, number), noise_generator(1, 1, -1))
    if noise:
        for noised in (ours, theirs):
            wanted = noise * clip / number
            assert std_of(difference(noised, clean)) == pytest.approx(wanted, rel=0.02)
    else:
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_one_node_more_moves_the_mean_by_at_most_the_clip_over_the_expected_number() -> None:
    privacy, updates = Privacy(0.5, 0.0, 8.0), [state(i) for i in range(5)]
    without, with_it = (private_mean(u, privacy, torch.Generator()) for u in (updates[1:], updates))
    assert update_norm(difference(with_it, without)) == pytest.approx(0.5 / 8)


def test_an_update_of_zeros_stays_and_no_update_is_refused() -> None:
    zeros = {"w": torch.zeros(3)}
    assert clip_update(zeros, 1.0)["w"].tolist() == [0, 0, 0]
    with pytest.raises(ReplyError, match="expected at least one, got none"):
        private_mean([], Privacy(1.0, 1.0, 1.0), torch.Generator())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((0.0, 1.0, 10.0), "clip: expected a number above 0, got 0.0"),
        ((1.0, -1.0, 10.0), "noise_multiplier: expected a number 0 or more, got -1.0"),
        ((1.0, math.nan, 10.0), "noise_multiplier"),
        ((1.0, 1.0, math.inf), "expected: expected a number above 0"),
    ],
)
def test_privacy_says_what_is_wrong_with_it(given: tuple[float, ...], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Privacy(*given)


def test_noise_is_another_for_each_node_round_and_seed() -> None:
    draws = {
        float(torch.randn(1, generator=noise_generator(*who)))
        for who in [(1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0), (1, 1, -1)]
    }
    assert len(draws) == 5


def test_each_node_is_sampled_with_the_same_probability_whoever_else_is() -> None:
    config = Config(seed=3, fraction_clients_train=0.2)
    sizes = [len(poisson_sample(range(50), config, r)) for r in range(1, 401)]
    assert np.mean(sizes) == pytest.approx(10, abs=0.5)
    assert np.var(sizes) == pytest.approx(50 * 0.2 * 0.8, rel=0.2)  # binomial, not fixed


# --- epsilon


def test_without_sampling_epsilon_is_that_of_one_gaussian_with_less_noise() -> None:
    """Balle & Wang, arXiv:1805.06530, theorem 8: delta of a Gaussian with this epsilon."""
    noise, rounds, delta = 4.0, 9, 1e-5
    found = epsilon(noise, 1.0, rounds, delta)
    sigma = noise / 3
    a, b = 1 / (2 * sigma) - found * sigma, -1 / (2 * sigma) - found * sigma
    assert norm.cdf(a) - math.exp(found) * norm.cdf(b) == pytest.approx(delta, rel=0.01)
    assert epsilon_of_replies(2 * noise, rounds, delta) == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_epsilon_lies_a_little_below_renyis_bound(noise: float) -> None:
    accountant = rdp.RdpAccountant(orders=list(range(2, 65)))
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(event, 10)
    bound = accountant.get_epsilon(1e-5)
    assert 0.7 * bound < epsilon(noise, 0.2, 10, 1e-5) < bound


def test_more_noise_or_fewer_rounds_or_seldomer_sampling_is_more_private() -> None:
    cases = [(1.0, 0.2, 10), (2.0, 0.2, 10), (2.0, 0.2, 5), (2.0, 0.1, 5)]
    values = [epsilon(*case, 1e-5) for case in cases]
    assert all(later < earlier for earlier, later in pairwise(values))


def test_without_noise_there_is_no_epsilon() -> None:
    assert epsilon(0.0, 0.2, 10, 1e-5) == epsilon_of_replies(0.0, 1, 1e-5) == math.inf


# --- on the wire


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    return make_config(tiny_folder, tmp_path)


def grid_of(config: Config) -> LocalGrid:
    app = make_client_app(config)
    app.train("private")(partial(answer, handle_private_train, config=config))
    return LocalGrid(app, NUM_NODES)


def ask(config: Config, **changes: Any) -> Message:
    grid, model = grid_of(config), CNN(torch.Generator().manual_seed(7)).state_dict()
    given = {"learning_rate": 0.1, "clip": 0.5, "noise_multiplier": 0.0} | changes
    request = PrivateRequest(model, 1, config.dataset, **given)
    message = Message(messages.encode(request), 2, TRAIN_PRIVATE)
    [reply] = grid.pull_messages(grid.push_messages([message]))
    return reply


def update_of(reply: Message) -> State:
    model = CNN(torch.Generator().manual_seed(7)).state_dict()
    return difference(messages.decode(PrivateReply, reply.content).model, model)


def test_a_private_reply_is_clipped_and_carries_nothing_else(config: Config) -> None:
    reply = ask(config)
    assert list(reply.content) == ["model"]
    assert update_norm(update_of(reply)) == pytest.approx(0.5, rel=1e-4)


def test_a_private_reply_is_noised_the_same_in_every_run(config: Config) -> None:
    quiet, noisy, again = ask(config), ask(config, noise_multiplier=0.4), None
    again = ask(config, noise_multiplier=0.4)
    noise = difference(update_of(noisy), update_of(quiet))
    assert std_of(noise) == pytest.approx(0.2, rel=0.02)
    assert state_hash(update_of(noisy)) == state_hash(update_of(again))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"clip": 0.0}, "config: clip: expected 1e-09 to 1000000000.0, got 0.0"),
        ({"noise_multiplier": -1.0}, "config: noise-multiplier: expected 0.0 to"),
        ({"clip": 1}, "config: clip: expected a finite float, got 1"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(
    config: Config, changes: dict[str, Any], wanted: str
) -> None:
    reply = ask(config, **changes)
    assert reply.has_error()
    assert reply.error.reason.startswith(wanted)
    assert "\n" not in reply.error.reason


def test_a_run_repeats_to_the_bit_and_noise_changes_it(config: Config) -> None:
    runs = [
        state_hash(list(run_private(grid_of(config), config, privacy))[-1])
        for privacy in (Privacy(0.5, z, 2.0) for z in (0.0, 1.0, 1.0))
    ]
    assert runs[1] == runs[2] != runs[0]


def test_a_round_without_any_node_still_adds_its_noise(config: Config) -> None:
    from dataclasses import replace

    nobody = replace(config, fraction_clients_train=1e-9, num_server_rounds=2)
    first, second = run_private(grid_of(nobody), nobody, Privacy(0.5, 1.0, 2.0))
    assert std_of(difference(second, first)) == pytest.approx(0.25, rel=0.02)
