"""Broken and lying nodes among the other algorithms: refused, counted, and forgotten."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedlib import Config, LocalGrid, State, clone_state, make_client_app, make_model, open_dataset
from fedlib.algorithms.asynchronous import FedAsync, FedBuff, Rule, run_async
from fedlib.algorithms.leakage import label_mixture
from fedlib.algorithms.local_training import corrected_gradients
from fedlib.algorithms.masks import FixedPoint
from fedlib.algorithms.messages import ScaffoldReply, ScaffoldRequest
from fedlib.algorithms.personal_head import handle_train_personal, split_model
from fedlib.algorithms.privacy import epsilon, epsilon_of_replies
from fedlib.algorithms.scaffold import ScaffoldMean, handle_scaffold, zero_control
from fedlib.algorithms.secure_aggregation import unusable_keys
from fedlib.algorithms.server_optimizers import fedadam, fedavgm
from fedlib.client_app import answer
from fedlib.errors import ConfigError
from fedlib.messages import TRAIN, TrainReply, TrainRequest, encode, sent_model
from fedlib.model import check_state
from fedlib.server_app import ServerStep

HUGE = 3.4e38


@pytest.mark.parametrize("step", [fedavgm(0.9), fedadam(0.01)], ids=["FedAvgM", "FedAdam"])
def test_a_mean_that_overflows_the_servers_memory_is_forgotten(step: ServerStep) -> None:
    config, model = Config(use_wandb=False), {"w": torch.zeros(1), "n": torch.tensor(3)}
    kept, memory = step(config, model, {"w": torch.ones(1), "n": torch.tensor(5)}, {})
    assert kept["n"].dtype == torch.int64 and kept["n"].item() == 5  # a counter takes no step
    for wrong in (HUGE, -HUGE):
        far, memory_of_it = step(config, kept, {"w": torch.tensor([wrong])} | {"n": kept["n"]}, {})
        far, memory_of_it = step(config, far, {"w": -far["w"], "n": kept["n"]}, memory_of_it)
        for state in (far, memory_of_it):
            assert all(tensor.isfinite().all() for tensor in state.values())
    assert step(config, kept, kept, memory)[0]["w"].isfinite().all()


def test_a_boast_cannot_make_scaffolds_control_infinite() -> None:
    model, control = {"w": torch.zeros(2)}, {"w": torch.zeros(2)}
    for change, kept in ((1e32, 1e32), (HUGE, HUGE)):
        mean = ScaffoldMean(model, control)
        reply = ScaffoldReply(model, 10**12, 1.0, 1, {"w": torch.full((2,), change)})
        mean.add(reply, 10**12)
        _, following = mean.result(5_000)
        assert following["w"].tolist() == pytest.approx([kept, kept])
        again = ScaffoldMean(model, following)
        again.add(reply, 10**12)
        check_state(again.result(5_000)[1], control)  # finite: what overflows is left out


@pytest.mark.parametrize(
    ("action", "handler", "record"),
    [
        ("scaffold", handle_scaffold, "own-control"),
        ("personal", handle_train_personal, "head"),
    ],
)
def test_what_a_node_keeps_stays_as_it_was_when_its_training_diverges(
    action: str, handler: Any, record: str, small_config: Config
) -> None:
    config = Config(**{**vars(small_config), "momentum": 0.0})
    app = make_client_app(config)
    app.train(action)(partial(answer, handler, config=config))
    grid = LocalGrid(app, 3)
    dataset = open_dataset(config.dataset)
    net = make_model(dataset, torch.Generator().manual_seed(1))
    good, zeros = clone_state(net), zero_control(net)
    states = []
    for scale in (1.0, 1e30):
        model = {name: scale * tensor for name, tensor in good.items()}
        told = 1, config.dataset, 0.05
        request: Any = ScaffoldRequest(model, *told, zeros)
        if action == "personal":
            request = TrainRequest(split_model(model)[0], *told)
        message = Message(encode(request), 2, f"{TRAIN}.{action}", ttl=60)
        [reply] = grid.send_and_receive([message])
        assert reply.has_error() == (scale > 1)
        states.append(repr(grid.contexts[2].state[record]))
    assert states[0] == states[1]


def test_a_model_that_would_overflow_is_refused_and_a_reply_that_comes_twice_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, model = ClientApp(), {"w": torch.zeros(1)}
    signs = iter([1, -1] * 10_000)

    @app.train()
    def lie(message: Message, context: Any) -> Message:
        state: State = {"w": torch.tensor([HUGE * next(signs)])}
        return Message(encode(TrainReply(state, 1, 1.0, 1)), reply_to=message)

    class Twice(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    rules: list[Rule] = [FedAsync(), FedBuff(size=2)]
    for rule in rules:
        config, grid = Config(use_wandb=False), Twice(app, 4)
        end, problems = run_async(
            grid, sorted(grid.contexts), model, rule, config, seconds=0.2, in_flight=2
        )
        check_state(end.model, model)
        assert problems and all("NaN or infinite" in line and len(line) < 400 for line in problems)


def test_keys_that_give_no_secret_and_keys_of_others_are_named() -> None:
    good = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
    reasons = unusable_keys({4: good[0], 5: bytes(32), 6: good[1], 7: good[0]})
    assert set(reasons) == {5, 7}
    assert "usable public key" in reasons[5] and "of another node" in reasons[7]


def test_a_message_of_ones_own_may_call_any_record_model() -> None:
    assert sent_model(RecordDict({"model": ConfigRecord({"name": "cnn"})})) is None


def test_a_frozen_parameter_needs_no_correction() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with corrected_gradients(model, lambda name, parameter, gradient: gradient * 0):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None and not model.weight.grad.any()


def test_edges_have_values() -> None:
    assert epsilon(1.0, 0.2, 0, 1e-5) == epsilon_of_replies(1.0, 0, 1e-5) == 0
    assert label_mixture(np.full(10, -1.0), 1.0).tolist() == [0.1] * 10
    for number, bound in ((0, 1.0), (10, float("inf"))):
        with pytest.raises(ConfigError, match="fixed point: expected"):
            FixedPoint(32, bound, 10, number)
