"""Differential privacy for whole nodes: clip each update, add Gaussian noise, count epsilon.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models",
arXiv:1710.06963, algorithm 1 with flat clipping: each node takes part with the same probability q,
independently of all others (Poisson sampling). All count alike, and the sum of their clipped
updates is divided by the *expected* number of nodes, qN, which no node's data can change.

The unit of privacy is a node: two federations are neighbours if one has one node more, with all
its data. Such a node moves the sum by at most the clip. Epsilon comes from Google's accountant,
``dp_accounting``, whose import takes two seconds and so happens only where it is asked.

Not for protecting people: the noise here follows from a seed, so that runs repeat, and who knows
the seed subtracts it. Floating-point noise also leaks in its last bits (Mironov, CCS 2012).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlib import messages
from fedlib.algorithms.common import initial_model
from fedlib.algorithms.local_training import prepare
from fedlib.algorithms.messages import TRAIN_PRIVATE, PrivateReply, PrivateRequest
from fedlib.client_app import Node
from fedlib.config import Config
from fedlib.data import open_dataset
from fedlib.errors import ConfigError, ReplyError
from fedlib.model import State, check_state, clone_state
from fedlib.nodes import Nodes
from fedlib.randomness import SERVER, Stream, numpy_generator, torch_generator
from fedlib.run_directory import Stage

NOISE_STREAM = 16  # besides those of fedlib.randomness.Stream
DISCRETIZATION = 1e-3  # of the privacy loss, in the accountant: coarser is faster and never too low


@dataclass(frozen=True)
class Privacy:
    """How updates are clipped, and how much noise hides one of them.

    Attributes:
        clip: C, the largest L2 norm of an update, over all its tensors together.
        noise_multiplier: z; the noise on the *sum* of the updates has a deviation of z * C.
        expected: qN, how many updates are expected in a round, and what the sum is divided by.
    """

    clip: float
    noise_multiplier: float
    expected: float

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("clip", self.clip, "above 0"),
            ("noise_multiplier", self.noise_multiplier, "0 or more"),
            ("expected", self.expected, "above 0"),
        ):
            allowed = value > 0 or (value == 0 and lowest == "0 or more")
            if not (allowed and value < float("inf")):
                raise ConfigError(f"privacy: {name}: expected a number {lowest}, got {value!r}")


def update_norm(update: State) -> float:
    """Return the L2 norm of all values of an update, as of one long vector."""
    squares = (tensor.double().square().sum() for tensor in update.values())
    return float(sum(squares, torch.zeros((), dtype=torch.float64)).sqrt())


def clip_update(update: State, clip: float) -> dict[str, Tensor]:
    """Return the update, shortened to the norm ``clip`` where it is longer; its direction stays.

    In float32, so an update more than 1e38 times as long as the clip can stay too long.
    """
    factor = min(1.0, clip / max(update_norm(update), 1e-300))
    return {name: tensor * factor for name, tensor in update.items()}


def add_noise(update: State, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the update plus Gaussian noise of deviation ``std`` on every value.

    The generator draws for the tensors in their order.
    """
    return {k: x + std * torch.randn(x.shape, generator=generator) for k, x in update.items()}


def private_mean(
    updates: Sequence[State], privacy: Privacy, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the clipped updates' sum over the expected number, with noise of deviation z C / qN.

    Raises:
        ReplyError: There is no update; where nobody was sampled, give one of zeros.
    """
    if not updates:
        raise ReplyError("updates: expected at least one, got none; give one of zeros")
    clipped = [clip_update(update, privacy.clip) for update in updates]
    mean = {k: sum(update[k] for update in clipped) / privacy.expected for k in updates[0]}
    std = privacy.noise_multiplier * privacy.clip / privacy.expected
    return add_noise(mean, std, generator)  # type: ignore[arg-type]


def noise_generator(seed: int, server_round: int, partition_id: int) -> torch.Generator:
    """Return the generator of the noise of one node, or of ``SERVER``, in one round.

    So that runs repeat. A deployment must draw from the system's secret randomness instead.
    """
    return torch_generator(seed, server_round, partition_id, NOISE_STREAM)


def poisson_sample(nodes: Sequence[int], config: Config, server_round: int) -> list[int]:
    """Let each node take part with the probability of the config, whatever the others do."""
    rng = numpy_generator(config.seed, server_round, SERVER, Stream.SAMPLE)
    coins = rng.random(len(nodes)) < config.fraction_clients_train
    return [node for node, takes_part in zip(nodes, coins, strict=True) if takes_part]


def handle_private_train(message: Message, node: Node) -> RecordDict:
    """Train as for TRAIN; reply with the model plus the clipped update, noised if so told."""
    request = messages.decode(PrivateRequest, message.content)
    training = prepare(request, node)
    training.start()
    update = clip_update(difference(clone_state(training.model), request.model), request.clip)
    if request.noise_multiplier:
        std = request.noise_multiplier * request.clip
        who = node.config.seed, request.server_round, node.partition_id
        update = add_noise(update, std, noise_generator(*who))
    return messages.encode(PrivateReply(moved(request.model, update)))


def difference(after: State, before: State) -> dict[str, Tensor]:
    """Return the update that leads from one model to another."""
    return {name: after[name] - tensor for name, tensor in before.items()}


def moved(model: State, update: State) -> dict[str, Tensor]:
    """Return the model that an update leads to."""
    return {name: tensor + update[name] for name, tensor in model.items()}


def run_private(
    grid: Grid,
    config: Config,
    privacy: Privacy,
    reply_noise: float = 0.0,
    mean: Callable[[Sequence[State], Privacy, torch.Generator], State] = private_mean,
) -> Iterator[State]:
    """Train with private rounds, and yield the global model after each.

    Args:
        grid: Its nodes know ``train.private``.
        config: The run's config; ``fraction_clients_train`` is the probability q.
        privacy: The clip, which the nodes apply too, and the noise of the *server*.
        reply_noise: The noise multiplier of the *nodes*: each adds a deviation of this times C.
        mean: Makes the private mean; a function of your own can stand here.
    """
    nodes, dataset = Nodes(grid), open_dataset(config.dataset)
    model: State = initial_model(dataset, config.seed)
    # Wide enough for the nodes' own noise, which is not to be clipped a second time.
    server = privacy if not reply_noise else Privacy(1e300, 0.0, privacy.expected)
    for server_round in range(1, config.num_server_rounds + 1):
        online = nodes.roll_call(config.roll_call_timeout, wait_for_all=server_round == 1)
        sampled, stage = poisson_sample(online, config, server_round), Stage()
        request = PrivateRequest(
            model=model,
            server_round=server_round,
            dataset=config.dataset,
            learning_rate=config.learning_rate_at(server_round),
            clip=privacy.clip,
            noise_multiplier=reply_noise,
        )
        asked = TRAIN_PRIVATE, sampled, messages.encode(request), stage, config.reply_timeout
        replies = nodes.ask(*asked, kind=PrivateReply)
        came = {(nodes.partitions[i], i): difference(r.model, model) for i, r in replies}
        updates: list[State] = [came[who] for who in sorted(came)]  # for the same bits
        # Without a reply, a round is like any other: its noise hides that nobody was there.
        updates = updates or [{name: torch.zeros_like(x) for name, x in model.items()}]
        noise = noise_generator(config.seed, server_round, SERVER)
        following = moved(model, mean(updates, server, noise))
        with suppress(ReplyError):  # a sum too large for float32: the model stays as it was
            check_state(following, model)
            model = following
        yield model


def epsilon(noise_multiplier: float, probability: float, rounds: int, delta: float) -> float:
    """Return the epsilon of all models that the server publishes, for one node more or less.

    The unit is a node with all its data; nodes take part by Poisson sampling.

    Source: ``dp_accounting.pld.PLDAccountant`` (Doroshenko et al., arXiv:2207.04380).
    """
    if noise_multiplier == 0 or rounds == 0:
        return float("inf") if rounds else 0.0
    import dp_accounting
    from dp_accounting import pld

    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation, DISCRETIZATION)
    noise = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(probability, noise), rounds)
    return float(accountant.get_epsilon(delta))


def epsilon_of_replies(reply_noise: float, num_replies: int, delta: float) -> float:
    """Return the epsilon of one node's own replies, towards whoever reads each of them.

    Two federations are neighbours if this node has other data, so its clipped update moves by up to
    twice the clip. Who reads the replies knows who took part: the sampling hides nothing.

    Source: ``dp_accounting.get_epsilon_gaussian`` (Balle & Wang, arXiv:1805.06530); k replies with
    Gaussian noise tell as much as one with a deviation smaller by the root of k (Dong et al.,
    arXiv:1905.02383, corollary 3.3).
    """
    if reply_noise == 0 or num_replies == 0:
        return float("inf") if num_replies else 0.0
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(reply_noise / 2 / num_replies**0.5, delta))
