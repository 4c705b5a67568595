"""What all tests share: a cache of their own, no network, and a small data set."""

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

# Set before anything imports datasets or wandb, and inherited by every process a test starts.
_SCRATCH = Path(tempfile.mkdtemp(prefix="fedlib-tests-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
os.environ["FEDLIB_CACHE_DIR"] = str(_SCRATCH / "cache")
os.environ["HF_HOME"] = str(_SCRATCH / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NETRC"] = str(_SCRATCH / "no-netrc")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)

from course import write_small_copy  # noqa: E402
from fedlib import Config, Dataset, open_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def _our_warnings_are_errors() -> None:
    warnings.filterwarnings("error", module=r"(fedlib|course)(\..*)?$")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's parquet layout: 1,200 training and 200 test images."""
    folder = tmp_path_factory.mktemp("small")
    write_small_copy(folder, num_train=1_200, num_test=200)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 40 test images: enough where nothing needs to be learnt."""
    folder = tmp_path_factory.mktemp("tiny")
    write_small_copy(folder, num_train=120, num_test=40)
    return folder


@pytest.fixture(scope="session")
def small_dataset(small_folder: Path) -> Dataset:
    """The same, decoded."""
    return open_dataset(str(small_folder))


@pytest.fixture
def small_config(small_folder: Path, tmp_path: Path) -> Config:
    """Two quick rounds in which every node answers at once."""
    return Config(
        num_server_rounds=2,
        fraction_clients_train=0.5,
        dataset=str(small_folder),
        query_max_delay=0.0,
        use_wandb=False,
        output_dir=str(tmp_path / "outputs"),
    )
