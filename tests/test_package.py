"""What the package promises as a whole: one door, pure maths, light imports, a true README."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedlib
from fedlib import Dataset

PACKAGE = Path(fedlib.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
PURE = {
    *("aggregation", "config", "console", "credentials", "data", "errors", "model"),
    *("randomness", "run_directory", "schedule", "training"),
}
PUBLIC_FLOWER = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation"}
# One private name, in one place; the reason stands there.
PRIVATE_FLOWER = {"local_grid": {"flwr.supercore.task_identity"}}


def imports(name: str) -> set[str]:
    """Return the full names of all modules that a module imports, in functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} imports relatively"
            found.add(node.module)
    return found


def test_every_public_name_is_there_and_documented() -> None:
    nodes = [node for node in TREES["__init__"].body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert len(names) == len(set(names)) > 40
    for name in names:
        value = getattr(fedlib, name)
        if getattr(value, "__module__", "").startswith("fedlib"):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
    for module, tree in TREES.items():
        assert ast.get_docstring(tree), module


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_maths_knows_neither_flower_nor_wandb_nor_matplotlib(name: str) -> None:
    roots = {module.split(".")[0] for module in imports(name)}
    assert not roots & {"flwr", "wandb", "matplotlib", "ray"}
    assert {module for module in imports(name) if module.startswith("fedlib")} <= {
        f"fedlib.{pure}" for pure in PURE
    }


def test_only_flowers_public_modules_are_imported() -> None:
    for name in TEXTS:
        flowers = {module for module in imports(name) if module.split(".")[0] == "flwr"}
        assert flowers <= PUBLIC_FLOWER | PRIVATE_FLOWER.get(name, set()), name


def test_nothing_seeds_a_global_generator() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"torch\.manual_seed|np\.random\.seed", text), name
        assert "random" not in imports(name), name


def test_a_client_process_imports_nothing_heavy_and_reads_what_another_decoded(
    small_dataset: Dataset,
) -> None:
    fedlib.partition_indices(small_dataset, 3, 1.0, 42)
    code = (
        "import json, sys, fedlib.client_app; from fedlib import load_partition, open_dataset\n"
        "partition = load_partition(open_dataset(sys.argv[1]), 3, 1.0, 42, 1)\n"
        "print(json.dumps([list(sys.modules), partition.train.images.sum().item()]))"
    )
    command = [sys.executable, "-c", code, small_dataset.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules, total = json.loads(done.stdout)
    heavy = {"datasets", "flwr_datasets", "PIL", "pyarrow", "torchvision"}
    assert not (heavy | {"wandb", "matplotlib", "psutil", "ray"}) & set(modules)
    assert total == fedlib.load_partition(small_dataset, 3, 1.0, 42, 1).train.images.sum().item()


def test_the_readme_lists_every_key_with_its_default() -> None:
    section = README.split("## Run config")[1]
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|([^|]*)\|", section, flags=re.MULTILINE))
    defaults = fedlib.Config().to_run_config().items()
    expected = {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in defaults}
    assert {key: written.strip() for key, written in rows.items()} == expected


def test_the_readme_lists_every_module_and_which_of_them_know_flower() -> None:
    section = README.split("## Run config")[0]
    rows = dict(re.findall(r"^\| `([a-z_]+)` \|.*\| (yes|no) \|$", section, flags=re.MULTILINE))
    assert rows.keys() == TEXTS.keys() - {"__init__"}
    for name, knows in rows.items():
        flower = any(module.split(".")[0] == "flwr" for module in imports(name))
        assert flower == (knows == "yes"), name


def test_the_app_has_no_more_lines_than_its_readme_says() -> None:
    stated = re.search(r"([\d,]+)\s+lines", README)
    assert stated, "fedlib/README.md does not say how many lines the app has"
    assert sum(text.count("\n") for text in TEXTS.values()) <= int(stated[1].replace(",", ""))
