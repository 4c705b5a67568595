"""A personal last layer: what travels, what stays, and what a node without a head does."""

from typing import Any

import pytest
import torch

from course.labs.send_less import (
    EVALUATE_PERSONAL,
    EVALUATE_TUNED,
    PERSONAL,
    ask_to_evaluate,
    make_app,
    replace_nodes,
    rounds,
    with_memory,
)
from fedlib import (
    Config,
    Dataset,
    LocalGrid,
    Nodes,
    ReplyError,
    Stage,
    evaluate,
    load_partition,
    make_model,
    train,
)
from fedlib.algorithms.common import initial_model
from fedlib.algorithms.personal_head import HEAD, split_model
from fedlib.messages import EVALUATE, TRAIN, TrainReply, TrainRequest, encode
from fedlib.randomness import Stream, torch_generator

NUM_NODES = 4


def grid_of(config: Config) -> LocalGrid:
    return LocalGrid(make_app(config), NUM_NODES)


def by_hand(config: Config, dataset: Dataset, state: Any, partition_id: int, head: bool) -> Any:
    """Train with plain PyTorch; with ``head``, of the head alone."""
    model = make_model(dataset, torch.Generator())
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not head or name.startswith("fc2."))
    place = (NUM_NODES, config.dirichlet_alpha, config.seed, partition_id)
    own = load_partition(dataset, *place)
    server_round = config.num_server_rounds + 1 if head else 1
    train(
        model,
        own.train,
        epochs=1,
        batch_size=32,
        learning_rate=0.02 if head else config.learning_rate_at(1),
        momentum=0.9,
        generator=torch_generator(config.seed, server_round, partition_id, Stream.TRAIN),
    )
    return model, 100 * evaluate(model, own.validation).accuracy


def test_the_head_stays_and_the_body_travels(small_config: Config, small_dataset: Dataset) -> None:
    torch.set_num_threads(1)
    grid = grid_of(small_config)
    _, body, stage = next(rounds(grid, small_config, PERSONAL))
    assert not stage.problems
    assert not [name for name in body if name.startswith("fc2")]
    start = initial_model(small_dataset, small_config.seed)
    trained, total = {}, dict[str, Any]()
    for partition_id in with_memory(grid):
        model, _ = by_hand(small_config, small_dataset, start, partition_id, head=False)
        trained[partition_id] = model.state_dict()
        kept: Any = grid.contexts[partition_id + 2].state[HEAD]
        for name, tensor in kept.to_torch_state_dict().items():
            assert torch.equal(tensor, trained[partition_id][name])
    sizes = {
        p: len(load_partition(small_dataset, NUM_NODES, 1.0, small_config.seed, p).train)
        for p in trained
    }
    for name in body:
        total[name] = sum(sizes[p] * trained[p][name].double() for p in trained)
        mean = total[name] / sum(sizes.values())
        assert torch.allclose(body[name], mean.float(), rtol=0, atol=1e-7)


def test_a_node_evaluates_with_its_own_head_else_with_the_initial_one(
    small_config: Config, small_dataset: Dataset
) -> None:
    grid = grid_of(small_config)
    _, body, _ = next(rounds(grid, small_config, PERSONAL))
    found = ask_to_evaluate(grid, small_config, body, EVALUATE_PERSONAL, range(NUM_NODES))
    keepers = with_memory(grid)
    start = split_model(initial_model(small_dataset, small_config.seed))[1]
    for partition_id, accuracy in enumerate(found):
        kept: Any = grid.contexts[partition_id + 2].state.get(HEAD)
        head = dict(kept.to_torch_state_dict()) if partition_id in keepers else start
        model = make_model(small_dataset, torch.Generator())
        model.load_state_dict({**body, **head})
        place = (NUM_NODES, 1.0, small_config.seed, partition_id)
        own = load_partition(small_dataset, *place).validation
        assert accuracy == pytest.approx(100 * evaluate(model, own).accuracy)


def test_a_replaced_node_begins_with_the_initial_head(small_config: Config) -> None:
    grid = grid_of(small_config)
    _, body, _ = next(rounds(grid, small_config, PERSONAL))
    fresh = ask_to_evaluate(grid_of(small_config), small_config, body, EVALUATE_PERSONAL, range(4))
    replace_nodes(grid, with_memory(grid))
    assert not with_memory(grid)
    assert ask_to_evaluate(grid, small_config, body, EVALUATE_PERSONAL, range(4)) == fresh


def test_tuning_trains_the_head_alone_and_keeps_nothing(
    small_config: Config, small_dataset: Dataset
) -> None:
    grid = grid_of(small_config)
    model = initial_model(small_dataset, small_config.seed)
    found = ask_to_evaluate(grid, small_config, model, EVALUATE_TUNED, range(NUM_NODES), 0.02)
    for partition_id, accuracy in enumerate(found):
        tuned, wanted = by_hand(small_config, small_dataset, model, partition_id, head=True)
        assert accuracy == pytest.approx(wanted)
        assert torch.equal(tuned.state_dict()["fc1.weight"], model["fc1.weight"])
    assert not with_memory(grid)
    assert found != ask_to_evaluate(grid, small_config, model, EVALUATE, range(NUM_NODES))


def test_a_whole_model_is_no_body(small_config: Config, small_dataset: Dataset) -> None:
    grid, stage = grid_of(small_config), Stage()
    whole = initial_model(small_dataset, small_config.seed)
    nodes = Nodes(grid)
    content = encode(TrainRequest(whole, 1, small_config.dataset, 0.05))
    online = nodes.roll_call(10)
    assert not list(nodes.ask(PERSONAL, online[:1], content, stage, 60, kind=TrainReply))
    [problem] = stage.problems
    assert "expected a body without ['fc2.bias', 'fc2.weight'], got a whole model" in problem


def test_a_body_that_diverged_leaves_the_old_head(small_config: Config) -> None:
    grid = grid_of(small_config)
    playing = rounds(grid, small_config, PERSONAL)
    _, body, _ = next(playing)
    [first, *_] = with_memory(grid)
    before: Any = grid.contexts[first + 2].state[HEAD]
    content = encode(
        TrainRequest({k: t + 1e30 for k, t in body.items()}, 2, small_config.dataset, 1)
    )
    nodes, stage = Nodes(grid), Stage()
    asked = [n for n in nodes.roll_call(10) if nodes.partitions[n] == first]
    assert not list(nodes.ask(PERSONAL, asked, content, stage, 60, kind=TrainReply))
    assert grid.contexts[first + 2].state[HEAD] is before


def test_a_model_without_that_layer_has_no_head() -> None:
    with pytest.raises(ReplyError, match="expected a last layer fc2"):
        split_model({"fc1.weight": torch.zeros(1)})
    assert f"{TRAIN}.personal" == PERSONAL
