"""What all tests share: a cache of their own, no network, and a small data set."""

import os
import tempfile
import warnings
from pathlib import Path

import pytest

# Set before anything imports datasets or wandb, and inherited by every process a test starts.
_SCRATCH = Path(tempfile.mkdtemp(prefix="fedlib-tests-"))
os.environ["FEDLIB_CACHE_DIR"] = str(_SCRATCH / "cache")
os.environ["HF_HOME"] = str(_SCRATCH / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NETRC"] = str(_SCRATCH / "no-netrc")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)

from fedlib.config import Config  # noqa: E402
from fedlib.data import Dataset, open_dataset  # noqa: E402
from fedlib.notebook import write_small_copy  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def _our_warnings_are_errors() -> None:
    warnings.filterwarnings("error", module=r"fedlib(\..*)?$")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's parquet layout: 1,200 training and 200 test images."""
    folder = tmp_path_factory.mktemp("small")
    write_small_copy(folder, num_train=1_200, num_test=200)
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
