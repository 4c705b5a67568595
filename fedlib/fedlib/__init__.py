"""fedlib: federated learning on Flower's Message API, in a package that one reads in an hour.

Everything public is here, ``from fedlib import CNN``; modules in the order in which to read them.
A name is imported when it is first used, so that a client process loads neither matplotlib nor
the server.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "config": ("Config",),
    "prepare": ("find_source",),
    "data": (
        "Dataset",
        "Partition",
        "Split",
        "federated_dataset",
        "load_partition",
        "load_test",
        "open_dataset",
        "partition_indices",
    ),
    "model": ("CNN", "State", "check_state", "clone_state", "state_hash"),
    "training": ("Evaluation", "Weighted", "augment", "crop_and_flip", "evaluate", "train"),
    "randomness": ("SERVER", "Stream", "numpy_generator", "torch_generator"),
    "client_app": ("make_client_app",),
    "local_grid": ("LocalGrid", "enter_local_run"),
    "aggregation": ("FedAvg",),
    "schedule": ("SCHEDULES", "learning_rate"),
    "federation": ("Federation",),
    "results": ("Round", "RunDirectory", "Stage", "mean_and_std"),
    "server_app": ("make_server_app", "run", "run_round"),
    "plots": (
        *("CENTRAL", "FEDERATED", "NEUTRAL", "TEN_COLOURS", "WAITING", "Span"),
        *("load_results", "plot_metrics", "plot_partitions", "plot_timeline"),
    ),
    "notebook": ("BACKEND", "set_up_notebook", "show", "write_small_copy"),
    "processes": ("FlowerHome",),
    "credentials": ("Credentials", "make_credentials"),
    "deployment": ("Deployment",),
    "errors": (
        "ConfigError",
        "DataError",
        "FedlibError",
        "ReplyError",
        "RunDirectoryError",
        "TooLateError",
    ),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedlib' has no attribute {name!r}")
    return getattr(import_module(f"fedlib.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
