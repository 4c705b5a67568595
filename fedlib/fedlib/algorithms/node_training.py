"""What a node of more than one algorithm does: train a model on its own data, as TRAIN does."""

from torch import nn

from fedlib.client_app import Node
from fedlib.data import Dataset
from fedlib.messages import TrainRequest
from fedlib.randomness import Stream, torch_generator
from fedlib.training import Weighted, single_thread, train


def train_on_own_data(
    model: nn.Module, node: Node, request: TrainRequest, dataset: Dataset, device: str
) -> tuple[int, Weighted]:
    """Train a model in place with TRAIN's chance: the same steps, whatever becomes of the result.

    A parameter that asks for no gradient stays as it is.

    Returns:
        The number of examples, and the training loss (nats) over every one of every epoch.
    """
    config, partition = node.config, node.load(dataset, device)
    who = (config.seed, request.server_round, node.partition_id)
    with single_thread():
        loss = train(
            model,
            partition.train,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=request.learning_rate,
            momentum=config.momentum,
            generator=torch_generator(*who, Stream.TRAIN),
            augmentation=config.augmentation,
            device=device,
        )
    return len(partition.train), loss
