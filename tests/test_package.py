"""What the package promises as a whole: one door, small modules, light imports, pure maths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedlib

PACKAGE = Path(fedlib.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
PURE = (
    *("aggregation", "config", "console", "credentials", "data", "model"),
    *("plots", "processes"),
    *("prepare", "randomness", "results", "resume", "schedule", "training", "verdict"),
)
PUBLIC_FLOWER = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation"}
# One private name, in one place; the reason stands there.
PRIVATE_FLOWER = {"local_grid": {"flwr.supercore.task_identity"}}


def imports(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_public_names_are_exactly_these() -> None:
    assert fedlib.__all__ == [
        "BACKEND",
        "CENTRAL",
        "CNN",
        "Config",
        "ConfigError",
        "Credentials",
        "DataError",
        "Dataset",
        "Deployment",
        "Evaluation",
        "FEDERATED",
        "FedAvg",
        "Federation",
        "FedlibError",
        "FlowerHome",
        "LocalGrid",
        "NEUTRAL",
        "Partition",
        "ReplyError",
        "Round",
        "RunDirectory",
        "RunDirectoryError",
        "SCHEDULES",
        "SERVER",
        "Span",
        "Split",
        "Stage",
        "State",
        "Stream",
        "TEN_COLOURS",
        "TooLateError",
        "WAITING",
        "Weighted",
        "augment",
        "check_state",
        "clone_state",
        "crop_and_flip",
        "enter_local_run",
        "evaluate",
        "federated_dataset",
        "find_source",
        "learning_rate",
        "load_partition",
        "load_results",
        "load_test",
        "make_client_app",
        "make_credentials",
        "make_server_app",
        "mean_and_std",
        "numpy_generator",
        "open_dataset",
        "partition_indices",
        "plot_metrics",
        "plot_partitions",
        "plot_timeline",
        "run",
        "run_round",
        "set_up_notebook",
        "show",
        "state_hash",
        "torch_generator",
        "train",
        "write_small_copy",
    ]


@pytest.mark.parametrize("name", fedlib.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(fedlib, name)
    if callable(value) and name != "State":
        assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FedSGD'"):
        fedlib.FedSGD  # noqa: B018


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_module_is_read_in_one_sitting(module: Path) -> None:
    # The checks are a list of exercises: one reads an entry, not the module.
    limit = 450 if module.stem == "checks" else 250
    assert len(module.read_text(encoding="utf-8").splitlines()) <= limit


def test_the_maths_knows_neither_flower_nor_wandb() -> None:
    code = (
        "import sys; from importlib import import_module\n"
        f"for name in {PURE}:\n"
        "    import_module(f'fedlib.{name}')\n"
        "    for foreign in {'flwr', 'wandb'} & sys.modules.keys():\n"
        "        sys.exit(f'{name} imports {foreign}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_only_flowers_public_modules_are_imported(module: Path) -> None:
    flower = {name for name in imports(module) if name.split(".")[0] == "flwr"}
    assert flower <= PUBLIC_FLOWER | PRIVATE_FLOWER.get(module.stem, set())


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_nothing_seeds_a_global_generator(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert "torch.manual_seed" not in text
    assert "np.random.seed" not in text
    assert "import random\n" not in text


def test_a_client_process_imports_nothing_heavy() -> None:
    """PyTorch neither: a node answers a QUERY without it."""
    code = (
        "import sys, fedlib.client_app;"
        "print([m for m in ('datasets', 'flwr_datasets', 'matplotlib', 'torchvision', 'wandb',"
        " 'PIL', 'pyarrow', 'torch', 'fedlib.server_app') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_lists_every_key_with_its_default() -> None:
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    section = text.split("## Run config")[1]
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|([^|]*)\|", section, flags=re.MULTILINE))
    expected = fedlib.Config().to_run_config()
    assert rows.keys() == expected.keys()
    for key, value in expected.items():
        written = str(value).lower() if isinstance(value, bool) else str(value)
        assert rows[key].strip() == written, key


def test_the_readme_lists_every_module() -> None:
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z_]+)`", text.split("## Run config")[0]))
    assert {module.stem for module in MODULES} - {"__init__"} <= listed
