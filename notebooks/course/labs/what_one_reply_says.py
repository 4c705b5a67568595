"""Lab 16: what one reply says, and what clipping and noise change about it.

Three parts, each with five seeds: a node's label mixture from its update, images from an update,
and the accuracy that is left under differential privacy for whole nodes.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from course.labs import SEEDS, accuracy, lab_config, run_all, small_dataset
from course.plots import CENTRAL, FEDERATED, NEUTRAL, STYLE
from fedlib import (
    Config,
    LocalGrid,
    Split,
    State,
    clone_state,
    load_partition,
    load_test,
    make_client_app,
    make_model,
    open_dataset,
    torch_generator,
    train,
)
from fedlib.algorithms.common import initial_model
from fedlib.algorithms.leakage import (
    Floats,
    fit_scale,
    label_mixture,
    only_label,
    psnr,
    rebuild,
    step_weight,
    total_variation,
)
from fedlib.algorithms.messages import PRIVATE_ACTION
from fedlib.algorithms.privacy import (
    Privacy,
    add_noise,
    clip_update,
    difference,
    epsilon,
    epsilon_of_replies,
    handle_private_train,
    noise_generator,
    private_mean,
    run_private,
)
from fedlib.client_app import answer
from fedlib.randomness import Stream
from fedlib.training import single_thread

NUM_NODES, PROBABILITY, NUM_ROUNDS, ALPHA = 50, 0.2, 10, 1.0
EXPECTED = NUM_NODES * PROBABILITY
DELTA = 1e-5
CLIP = 0.3
"""Chosen on ``CHOOSING``, seeds that no result below uses."""
CHOOSING, CLIPS = (6, 7), (0.1, 0.3, 1.0)
NO_CLIP = 1e6
"""Longer than any update."""
NOISES = (0.1, 0.3, 1.0, 3.0)
"""Noise multipliers z: the deviation of the noise on the sum of a round's updates, in clips."""
SHADOWS = 20
EPOCHS = (1, 5)
IMAGE_ARMS = {
    "batch 1": (1, 1, 0.0),
    "batch 2": (2, 1, 0.0),
    "batch 4": (4, 1, 0.0),
    "batch 8": (8, 1, 0.0),
    "5 epochs": (1, 5, 0.0),
    "20 epochs": (1, 20, 0.0),
    "noise": (1, 1, 0.1),
}
"""Images in the batch, epochs over it, and the noise multiplier (with the clip, where not 0)."""
SINGLE_IMAGES = 3  # of each seed, one after the other, in the arms with a batch of one
DRAWN = (1, 2, 3)  # seeds of which pictures are kept


def reply_noise(noise_multiplier: float) -> float:
    """Return the noise multiplier of a node's reply when the nodes share the noise of the sum."""
    return float(noise_multiplier / EXPECTED**0.5)


def config(seed: int, num_rounds: int = NUM_ROUNDS) -> Config:
    """Return the config of a run."""
    own = {"fraction_clients_train": PROBABILITY, "dirichlet_alpha": ALPHA}
    return lab_config(seed, num_server_rounds=num_rounds, **own)


def private_app(settings: Config) -> Any:
    """Return fedlib's ClientApp, whose nodes also know ``train.private``."""
    app = make_client_app(settings)
    app.train(PRIVATE_ACTION)(partial(answer, handle_private_train, config=settings))
    return app


Mean = Callable[[Sequence[State], Privacy, torch.Generator], State]


def private_model(
    seed: int, clip: float, noise: float, where: str = "server", mean: Mean = private_mean
) -> State:
    """Run ten private rounds and return the last model; the noise is of the server or the nodes."""
    settings = config(seed)
    at_server = Privacy(clip, noise if where == "server" else 0.0, EXPECTED)
    at_nodes = reply_noise(noise) if where == "nodes" else 0.0
    grid = LocalGrid(private_app(settings), NUM_NODES)
    *_, last = run_private(grid, settings, at_server, at_nodes, mean)
    return last


# --- labels


def first_model(seed: int) -> State:
    """Return the model that a run begins with."""
    return initial_model(open_dataset(small_dataset()), seed)


def node_split(seed: int, partition_id: int) -> Split:
    """Return what a node trains on."""
    dataset = open_dataset(small_dataset())
    return load_partition(dataset, NUM_NODES, ALPHA, seed, partition_id).train


def mixture(split: Split) -> Floats:
    """Return the share of each label."""
    return np.bincount(split.labels.numpy(), minlength=10) / len(split)


def trained_update(
    state: State, split: Split, generator: torch.Generator, epochs: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Return what local training changes about a model."""
    settings, model = config(0), make_model(open_dataset(small_dataset()), torch.Generator())
    model.load_state_dict(dict(state))
    given = {"batch_size": settings.batch_size, "augmentation": settings.augmentation} | options
    with single_thread():
        train(
            model,
            split,
            epochs=epochs,
            learning_rate=settings.learning_rate,
            momentum=settings.momentum,
            generator=generator,
            **given,
        )
    return difference(clone_state(model), state)


def node_update(seed: int, state: State, partition_id: int, epochs: int = 1) -> dict[str, Tensor]:
    """Return the update that a node would send in round 1."""
    generator = torch_generator(seed, 1, partition_id, Stream.TRAIN)
    return trained_update(state, node_split(seed, partition_id), generator, epochs)


def weight_of(num_examples: int, epochs: int = 1) -> float:
    """Return ``step_weight`` of a node's training."""
    settings = config(0)
    num_steps = epochs * -(-num_examples // settings.batch_size)
    return step_weight(num_steps, settings.learning_rate, settings.momentum)


@cache
def shadow_split(number: int, num_examples: int = 240) -> Split:
    """Return images of the server's own test set, in a mixture that it draws itself."""
    test, rng = load_test(open_dataset(small_dataset())), np.random.default_rng([16, number])
    labels = rng.choice(10, num_examples, p=rng.dirichlet(np.ones(10) * ALPHA))
    of_class = [np.flatnonzero(test.labels.numpy() == label) for label in range(10)]
    chosen = [rng.choice(of_class[label]) for label in labels]
    return Split(test.images[chosen], test.labels[chosen], test.mean, test.std)


def shadow_updates(state: State, epochs: int = 1) -> list[dict[str, Tensor]]:
    """Return the updates of the server's shadow nodes."""
    generators = (torch.Generator().manual_seed(i) for i in range(SHADOWS))
    return [
        trained_update(state, shadow_split(i), generator, epochs)
        for i, generator in enumerate(generators)
    ]


def bias(update: State) -> Floats:
    """Return the change of the last layer's bias."""
    return np.asarray(update["fc2.bias"].double().numpy())


def hidden(updates: Iterable[State], noise: float, seed: int, first: int = 0) -> list[State]:
    """Return updates as nodes send them that clip, and add their share of the noise."""
    std = reply_noise(noise) * CLIP
    return [
        add_noise(clip_update(update, CLIP), std, noise_generator(seed, 1, first + i))
        for i, update in enumerate(updates)
    ]


def guesses(
    updates: Sequence[State], sizes: Sequence[int], shadows: Sequence[State], epochs: int = 1
) -> list[Floats]:
    """Return the estimated mixtures, with a scale that the server's shadow nodes give."""
    mixtures = [mixture(shadow_split(i)) for i in range(SHADOWS)]
    scale = fit_scale([bias(u) for u in shadows], mixtures, weight_of(240, epochs))
    pairs = zip(updates, sizes, strict=True)
    return [label_mixture(bias(u), weight_of(size, epochs), scale) for u, size in pairs]


def _label_case(seed: int) -> dict[str, Any]:
    """Return the mean distance between estimated and true mixtures, over all nodes of a seed."""
    splits = [node_split(seed, i) for i in range(NUM_NODES)]
    sizes, truths = [len(split) for split in splits], [mixture(split) for split in splits]
    overall = np.average(truths, axis=0, weights=sizes)
    found: dict[str, float] = {}
    drawn: dict[str, list[float]] = {"truth": _rounded(truths[0])}

    def note(name: str, mixtures: Sequence[Floats]) -> None:
        pairs = zip(mixtures, truths, strict=True)
        found[name] = round(float(np.mean([total_variation(p, q) for p, q in pairs])), 4)
        drawn[name] = _rounded(mixtures[0])

    note("uniform", [np.full(10, 0.1)] * NUM_NODES)
    note("all nodes together", [overall] * NUM_NODES)
    states = {"first": first_model(seed), "later": private_model(seed, NO_CLIP, 0.0)}
    for which, state in states.items():
        for epochs in EPOCHS if which == "first" else EPOCHS[:1]:
            updates = [node_update(seed, state, i, epochs) for i in range(NUM_NODES)]
            shadows = shadow_updates(state, epochs)
            name = f"{which} model, {epochs} epoch" + "s" * (epochs > 1)
            if name == "first model, 1 epoch":
                pairs = zip(updates, sizes, strict=True)
                note("formula alone", [label_mixture(bias(u), weight_of(n)) for u, n in pairs])
                for z in (0.0, *NOISES):
                    theirs, own = hidden(updates, z, seed), hidden(shadows, z, seed, 1000)
                    note(f"noise {z:g}", guesses(theirs, sizes, own))
            note(name, guesses(updates, sizes, shadows, epochs))
    return {"distance": found, "node 0": drawn if seed in DRAWN else {}}


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 3) for value in values]


# --- images


@cache
def images_of(seed: int) -> Split:
    """Return eight training images of eight labels, in an order that the seed draws."""
    splits = [node_split(seed, i) for i in range(NUM_NODES)]
    labels, pixels = (torch.cat([getattr(s, k) for s in splits]) for k in ("labels", "images"))
    rng = np.random.default_rng([16, seed])
    classes = rng.permutation(10)[:8]
    chosen = [rng.choice(np.flatnonzero(labels.numpy() == c)) for c in classes]
    return Split(pixels[chosen], labels[chosen], splits[0].mean, splits[0].std)


def attack(
    seed: int, batch: int, epochs: int = 1, noise: float = 0.0, first: int = 0
) -> tuple[Tensor, Split]:
    """Rebuild a batch from the update of a node that trained on it; return pixels, and the truth.

    The node has no other images and does not augment them. The server knows the labels, of one
    image from the update's sign. ``first`` is the batch's first of the seed's eight images.
    """
    eight, state = images_of(seed), first_model(seed)
    chosen = slice(first, first + batch)
    truth = Split(eight.images[chosen], eight.labels[chosen], eight.mean, eight.std)
    options = {"batch_size": batch, "augmentation": False}
    update: State = trained_update(state, truth, torch.Generator(), epochs, **options)
    if noise:
        (update,) = hidden([update], noise, seed)
    target = [-tensor for tensor in update.values()]
    labels = truth.labels
    if batch == 1 and not noise:
        labels = torch.tensor([only_label(target[-1])])
    model = make_model(open_dataset(small_dataset()), torch.Generator())
    model.load_state_dict(dict(state))
    with single_thread():
        height, width = truth.images.shape[1:]
        generator = torch.Generator().manual_seed(1000 * first + seed)
        found = rebuild(model, target, labels, (height, width), truth, generator)
    return found[:, 0] * truth.std[0] + truth.mean[0], truth


def class_means(labels: Tensor) -> Tensor:
    """Return for each label the mean of the server's own images: a guess without any update."""
    test = load_test(open_dataset(small_dataset()))
    return torch.stack([test.images[test.labels == c].float().mean(0) / 255 for c in labels])


def quality(pixels: Tensor, truth: Split) -> float:
    """Return the mean PSNR (dB) over the images of a batch."""
    wanted = truth.images.float() / 255
    return float(np.mean([psnr(a, b) for a, b in zip(pixels, wanted, strict=True)]))


def _image_case(case: tuple[int, str]) -> dict[str, Any]:
    seed, arm = case
    batch, epochs, noise = IMAGE_ARMS[arm]
    firsts = range(SINGLE_IMAGES if batch == 1 else 1)  # single images differ, so take some
    attacks = [attack(seed, batch, epochs, noise, first) for first in firsts]
    means = [class_means(truth.labels) for _, truth in attacks]
    kept = {"rebuilt": attacks[0][0][0]}
    if arm == "batch 1":
        kept |= {"truth": attacks[0][1].images[0] / 255, "guess": means[0][0]}
    pairs = zip(means, attacks, strict=True)
    return {
        "seed": seed,
        "arm": arm,
        "psnr": [round(quality(pixels, truth), 3) for pixels, truth in attacks],
        "guess": [round(quality(guess, truth), 3) for guess, (_, truth) in pairs],
        "pictures": {k: pack(v) for k, v in kept.items()} if seed in DRAWN else {},
    }


def pack(pixels: Tensor) -> str:
    """Return pixels from 0 to 1 as a text."""
    values = (255 * pixels).round().clamp(0, 255).to(torch.uint8).numpy()
    return base64.b64encode(values.tobytes()).decode()


def unpack(text: str) -> NDArray[np.uint8]:
    """Return the 28 by 28 pixels that ``pack`` made a text of."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(28, 28)


# --- accuracy and epsilon


def _accuracy_case(case: tuple[str, int, float, float]) -> float:
    where, seed, clip, noise = case
    last = private_model(seed, clip, noise, where)
    return round(accuracy(last, open_dataset(small_dataset())), 2)


def epsilons() -> dict[str, Any]:
    """Return what the accountant says, for each noise multiplier."""
    return {
        "published": [round(epsilon(z, PROBABILITY, NUM_ROUNDS, DELTA), 2) for z in NOISES],
        "one reply": [round(epsilon_of_replies(reply_noise(z), 1, DELTA), 1) for z in NOISES],
    }


# --- the picture at the end


def closing_picture(saved: dict[str, Any]) -> Figure:
    """Draw a node's true and recovered labels at three noise levels, and accuracy over epsilon."""
    with plt.rc_context(STYLE | {"axes.titlesize": 10, "legend.fontsize": 8}):
        figure = plt.figure(figsize=(8.4, 6))
        places = figure.add_gridspec(2, 3, height_ratios=[1, 1.6])
        _draw_labels([figure.add_subplot(places[0, i]) for i in range(3)], saved["labels"][0])
        _draw_accuracies(figure.add_subplot(places[1, :]), saved)
    return figure


def _draw_labels(panels: Sequence[Axes], found: dict[str, Any]) -> None:
    bars, places = found["node 0"], np.arange(10)
    for axes, z in zip(panels, (0.0, NOISES[0], NOISES[2]), strict=True):
        looks: dict[str, Any] = {"color": FEDERATED, "hatch": "//", "edgecolor": "white"}
        axes.bar(places - 0.2, bars["truth"], 0.4, color=CENTRAL, label="true")
        axes.bar(places + 0.2, bars[f"noise {z:g}"], 0.4, **looks, label="recovered")
        title = f"Node 0, clip, {f'z = {z:g}' if z else 'no noise'}"
        axes.set(title=title, xlabel="label", xticks=places, ylim=(0, 0.4))
    panels[0].set_ylabel("share of its images")
    panels[0].legend(loc="upper left", ncols=2, columnspacing=1)


def _draw_accuracies(axes: Axes, saved: dict[str, Any]) -> None:
    looks = (
        ("server", "published", "o", CENTRAL, "published models; the server adds the noise"),
        ("nodes", "one reply", "s", FEDERATED, "one reply; the nodes add the same noise together"),
    )
    for where, key, mark, colour, label in looks:
        runs = [saved["accuracy"].get(f"{where} {z:g}") for z in NOISES]
        points = list(zip(saved["epsilon"][key], NOISES, runs, strict=True))
        points = [(value, z, found) for value, z, found in points if found]
        for value, z, found in points:
            axes.plot([value] * len(found), found, mark, color=colour, alpha=0.4, ms=4, mew=0)
            text: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
            text |= {"fontsize": 8, "color": colour}
            place, shift = (min(found), -13) if where == "server" else (max(found), 6)
            axes.annotate(f"z = {z:g}", (value, place), (0, shift), **text)
        means = [float(np.mean(found)) for *_, found in points]
        axes.plot([value for value, *_ in points], means, "-", color=colour, label=label)
    for name, line in (("no clip", ":"), ("clip", "--")):
        mean = float(np.mean(saved["accuracy"][name]))
        axes.axhline(
            mean, color=NEUTRAL, ls=line, lw=1, label=f"{name}, no noise: epsilon infinite"
        )
    low = min(min(found) for found in saved["accuracy"].values())
    axes.set(xscale="log", ylim=(low - 8, 80), ylabel="accuracy (%)")
    axes.set_xlabel(f"epsilon (log); delta {DELTA:g}; unit of privacy: one node with all its data")
    axes.set_title("Accuracy after 10 rounds, 50 nodes: five seeds, lines through their means")
    axes.legend(loc="lower right")


# --- the experiment


def experiment() -> dict[str, Any]:
    """Return distances of mixtures, quality of images, and accuracies, for five seeds each."""
    parts = {"labels": labels(), "images": images(), "accuracy": accuracies()}
    return {"seeds": list(SEEDS)} | parts | {"epsilon": epsilons()}


def labels() -> list[dict[str, Any]]:
    """Return for each seed how far the estimated mixtures are from the true ones."""
    return run_all(_label_case, SEEDS)


def images() -> list[dict[str, Any]]:
    """Return how well images are rebuilt, in each arm."""
    return run_all(_image_case, [(seed, arm) for arm in IMAGE_ARMS for seed in SEEDS])


def accuracies() -> dict[str, list[float]]:
    """Return the accuracies (%) of each arm, in the order of the seeds."""
    arms = [("no clip", "server", NO_CLIP, 0.0), ("clip", "server", CLIP, 0.0)]
    arms += [(f"server {z:g}", "server", CLIP, z) for z in NOISES]
    arms += [(f"nodes {z:g}", "nodes", CLIP, z) for z in NOISES[:3]]
    runs = [(name, (where, seed, clip, z)) for name, where, clip, z in arms for seed in SEEDS]
    runs += [(f"choose {clip:g}", ("server", s, clip, 0.3)) for clip in CLIPS for s in CHOOSING]
    found: dict[str, list[float]] = {}
    for (name, _), value in zip(
        runs, run_all(_accuracy_case, [run for _, run in runs]), strict=True
    ):
        found.setdefault(name, []).append(value)
    return found
