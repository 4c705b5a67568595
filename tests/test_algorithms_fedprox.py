"""FedProx: the pull is the penalty's gradient, and Flower's own strategy ends with our weights."""

from functools import partial

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import strategy as flowers
from torch import nn

from course.labs.one_more_record import (
    FLOWER_KEYS,
    averaging,
    first_model,
    largest_difference,
    make_app,
    round_by_round,
    with_flowers_own,
)
from fedlib import (
    Config,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    make_client_app,
    run,
    server_step,
    state_hash,
)
from fedlib.algorithms.fedprox import pull_back
from fedlib.algorithms.local_training import corrected_gradients
from fedlib.algorithms.messages import PROXIMAL, ProximalRequest
from fedlib.messages import TrainReply, decode, encode, encode_model

NUM_NODES = 3


@pytest.fixture
def config(small_config: Config) -> Config:
    """A run of two rounds in which all nodes train, which Flower's strategies can do as well."""
    values = small_config.to_run_config() | {
        "fraction-clients-train": 1.0,
        "learning-rate-schedule": "constant",
        "momentum": 0.0,
        "dirichlet-alpha": 0.5,
    }
    return Config.from_run_config(values)


def last(config: Config, mu: float | None) -> dict[str, torch.Tensor]:
    grid = LocalGrid(make_app(config), NUM_NODES)
    return dict([model for model, _ in averaging(grid, config, mu=mu)][-1])


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.ones(4, 3, dtype=torch.float64)
    to = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    penalty = sum(((p - to[name]) ** 2).sum() for name, p in layer.named_parameters())
    (layer(x).square().sum() + 0.3 / 2 * penalty).backward()
    wanted = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    with corrected_gradients(layer, pull_back(to, mu=0.3)):
        layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, wanted[name])


def test_gradients_are_plain_again_after_the_block_whatever_happened_in_it() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError), corrected_gradients(layer, lambda *_: torch.full((1, 1), 9.0)):
        layer(torch.ones(1, 1)).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.item() == 9
        raise ValueError
    layer.zero_grad()
    layer(torch.ones(1, 1)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.item() == 1


def test_without_a_pull_it_is_fedavg_to_the_bit_and_fedavg_here_is_fedlibs(config: Config) -> None:
    fedavg = last(config, mu=None)
    assert state_hash(last(config, mu=0.0)) == state_hash(fedavg)
    assert state_hash(last(config, mu=1.0)) != state_hash(fedavg)
    fedlibs = run(LocalGrid(make_app(config), NUM_NODES), config)
    assert state_hash(fedlibs) == state_hash(fedavg)


@pytest.mark.parametrize("mu", [None, 0.5])
def test_flowers_own_strategy_ends_with_the_same_weights(config: Config, mu: float | None) -> None:
    kind = flowers.FedAvg if mu is None else partial(flowers.FedProx, proximal_mu=mu)
    first, *theirs = with_flowers_own(kind(**FLOWER_KEYS), config, NUM_NODES)
    ours = round_by_round([first, *theirs], config, NUM_NODES, server_step, mu)
    for mine, their in zip(ours, theirs, strict=True):
        assert largest_difference(mine, first) > 1e-2
        assert largest_difference(mine, their) < 1e-6


def test_a_stronger_pull_keeps_nodes_nearer(config: Config) -> None:
    first, grid = first_model(config), LocalGrid(make_app(config), NUM_NODES)
    nodes, distances = Nodes(grid), list[float]()
    online = nodes.roll_call(20.0)
    for mu in (0.0, 1.0, 10.0):
        content = encode(ProximalRequest(first, 1, config.dataset, 0.05, mu))
        [(_, reply)] = nodes.ask(PROXIMAL, online[:1], content, Stage(), 20.0, TrainReply)
        moves = ((reply.model[k] - first[k]).square().sum() for k in first)
        distances.append(float(sum(moves)) ** 0.5)
    assert distances == sorted(distances, reverse=True) and distances[0] > 1.2 * distances[2]


@pytest.mark.parametrize("mu", [-0.1, float("nan"), 1e9])
def test_a_pull_that_makes_no_sense_is_refused_in_one_line(config: Config, mu: float) -> None:
    content = encode(ProximalRequest(first_model(config), 1, config.dataset, 0.05, mu))
    with pytest.raises(ReplyError, match=r"^config: proximal-mu: expected .*, got .*$"):
        decode(ProximalRequest, content)


def test_it_costs_one_number_a_message(config: Config) -> None:
    def size(content: RecordDict) -> int:
        return sum(record.count_bytes() for record in content.values())

    model = first_model(config)
    request = ProximalRequest(model, 1, config.dataset, 0.05, 0.1)
    plain = RecordDict({"model": encode_model(model)})
    with_mu = encode(request)
    del with_mu["config"]["proximal-mu"]  # type: ignore[attr-defined]
    assert size(encode(request)) - size(with_mu) == len("proximal-mu") + 8
    assert size(with_mu) > size(plain)


def test_a_node_that_does_not_know_it_says_so(config: Config) -> None:
    grid = LocalGrid(make_client_app(config), 1)
    content = encode(ProximalRequest(first_model(config), 1, config.dataset, 0.05, 0.1))
    [reply] = grid.send_and_receive([Message(content, 2, PROXIMAL)])
    assert reply.has_error() and "proximal" in reply.error.reason
