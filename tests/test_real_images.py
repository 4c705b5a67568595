"""The whole app on 450 real Fashion-MNIST images, where they lie beside the project."""

import dataclasses
from pathlib import Path

from fedlib import Config, LocalGrid, load_results, make_client_app, run


def test_a_federation_learns_from_real_images(real_images: Path, small_config: Config) -> None:
    config = dataclasses.replace(
        small_config,
        dataset=str(real_images),
        num_server_rounds=10,
        fraction_clients_train=1.0,
        local_epochs=4,
        batch_size=8,
        learning_rate=0.01,
        dirichlet_alpha=10.0,
        learning_rate_schedule="constant",
    )
    run(LocalGrid(make_client_app(config), 8), config)
    results = load_results(next(Path(config.output_dir).glob("*/*")))
    assert results["dataset"] == str(real_images)
    assert all(record["train"]["num_received"] == 8 for record in results["rounds"])
    last = results["rounds"][-1]
    # 360 images to learn from, 90 to judge by: far above the 10 % of guessing.
    assert last["centralized_accuracy"] > 0.5
    assert last["federated_evaluate_accuracy"] is not None
