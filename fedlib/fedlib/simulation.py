"""A simulation in this process: Flower's engine, whose nodes are tasks for a few Ray actors."""

import os
import sys
from copy import deepcopy
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedlib.console import say
from fedlib.errors import FedlibError, one_line

BACKEND: dict[str, Any] = {
    "client_resources": {"num_cpus": 1, "max_restarts": -1},
    "init_args": {"logging_level": "ERROR", "log_to_driver": False},
}
"""One core a client process, which Ray brings back if it dies (Flower hands the options to
``ray.remote``), and no chatter from Ray (these go to ``ray.init``)."""


def simulate(
    server_app: ServerApp, client_app: ClientApp, num_nodes: int, backend: dict[str, Any] = BACKEND
) -> None:
    """Run both apps on Flower's simulation engine, in this process; nothing is returned.

    The ServerApp runs on a thread of this process, so it can hand results to its surroundings; the
    ClientApp in processes of its own. ``backend`` is Flower's ``backend_config``.

    Flower has deprecated ``run_simulation``; only this function calls it. Ray is started here,
    because it waits half a minute for its own processes, which a busy machine may exceed; Flower
    then uses the Ray that it finds.

    Raises:
        FedlibError: Ray did not start, the second time either.
    """
    # Only here: a deployed node has no use for them, and the second shows every deprecation.
    import ray
    from flwr.simulation import run_simulation

    options = {"include_dashboard": False, **backend.get("init_args", {})}
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    for last in (False, True):
        try:
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **options)
            break
        except Exception as error:  # a time-out, mostly; Ray has no name for it
            ray.shutdown()
            reason = one_line(f"{type(error).__name__}: {error}")[:200]
            if last:
                raise FedlibError(f"simulation: expected Ray to start, got {reason}") from error
            say(f"⚠️ Ray did not start ({reason}); trying once more.")
    try:
        run_simulation(server_app, client_app, num_nodes, backend_config=deepcopy(backend))
    finally:
        ray.shutdown()
