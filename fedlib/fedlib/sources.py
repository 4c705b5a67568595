"""Where a data set comes from: the Hub, a local folder, or the drawing board.

``auto`` takes Fashion-MNIST if it can be had at once, and the drawn stand-in if not.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedlib import drawing, garments
from fedlib.errors import DataError
from fedlib.prepare import build_once, cache_root

HUB_NAME = "zalando-datasets/fashion_mnist"
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Source:
    """One way to come by a data set.

    Attributes:
        name: ``fashion-mnist``, ``garments`` or the folder's absolute path.
        cache_folder: Where its decoded arrays belong; a changed source has another one.
        load_path: Returns what ``FederatedDataset(dataset=...)`` takes, drawing or checking
            first where that is needed.
    """

    name: str
    cache_folder: Path
    load_path: Callable[[], str]


def resolve_dataset(name: str) -> tuple[str, str]:
    """Replace ``auto`` by the best data set within reach.

    Args:
        name: ``auto``, ``fashion-mnist``, ``garments`` or a folder.

    Returns:
        The name to open, and in a few words why it was chosen.

    Raises:
        DataError: The name is none of these.
    """
    if name != "auto":
        return find_source(name).name, "as configured"
    if _is_cached():
        return "fashion-mnist", "it is in the cache"
    problem = _hub_problem()
    if problem is None:
        return "fashion-mnist", "the Hugging Face Hub answers"
    return "garments", f"Fashion-MNIST is not cached and {problem}"


def find_source(name: str) -> Source:
    """Return the source of a data set.

    Raises:
        DataError: The name is neither a known data set nor a folder with parquet files.
    """
    if name == "fashion-mnist":
        return Source(name, _fashion_mnist_folder(), _hub_path)
    if name == "garments":
        folder = cache_root() / f"garments-{_garments_digest()}"
        return Source(name, folder / "arrays", lambda: _garments_path(folder / "parquet"))
    try:
        folder = Path(name).expanduser().resolve()
        is_folder = folder.is_dir()
        files = sorted(folder.rglob("*.parquet")) if is_folder else []
    except (OSError, RuntimeError):  # a name too long, a home of nobody
        is_folder, files = False, []
    if any(character in name for character in "*["):
        raise DataError(
            f"dataset: expected a folder without * and [ in its path, which the datasets library "
            f"takes for a pattern, got {name!r}; rename it"
        )
    if not files:
        came = "a folder without .parquet files" if is_folder else "no such folder"
        raise DataError(
            f"dataset: expected auto, fashion-mnist, garments or the absolute path of a folder "
            f"with parquet files, got {name!r} ({came})"
        )
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(folder), state)).encode()).hexdigest()[:16]
    return Source(str(folder), cache_root() / f"folder-{digest}", lambda: str(folder))


@lru_cache(maxsize=1)
def _garments_digest() -> str:
    """Name the drawing by its code: another drawing is another data set."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (drawing, garments))
    return hashlib.sha256(code).hexdigest()[:8]


def _fashion_mnist_folder() -> Path:
    return cache_root() / "fashion-mnist"


def _garments_path(folder: Path) -> str:
    build_once(folder, garments.write_parquet)
    return str(folder)


def _is_cached() -> bool:
    if _fashion_mnist_folder().is_dir():
        return True
    import datasets

    hub_cache = Path(datasets.config.HF_DATASETS_CACHE)
    # The info file is written last: without it, the download broke off.
    return any((hub_cache / HUB_NAME.replace("/", "___")).rglob("dataset_info.json"))


def _hub_path() -> str:
    problem = None if _is_cached() else _hub_problem()
    if problem is not None:
        raise DataError(
            f"dataset: fashion-mnist is not in the cache and {problem}; "
            f"use dataset=garments, or the path of a folder that holds a copy"
        )
    return HUB_NAME


def _hub_problem() -> str | None:
    """Say why the Hub cannot be used, or None if it answers."""
    import huggingface_hub

    answer: list[str | None] = [f"the Hub did not answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(HUB_NAME, timeout=HUB_TIMEOUT_S)
            answer[0] = None
        except Exception as error:  # offline mode, no route, proxy, TLS, HTTP status ...
            answer[0] = f"the Hub is out of reach ({type(error).__name__})"

    # A thread, because looking up a name obeys no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answer[0]
