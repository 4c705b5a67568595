"""``pytest --nbmake notebooks``: without network or account, and nothing may keep running."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from refresh import environment

_SCRATCH = tempfile.TemporaryDirectory(prefix="notebooks-")


def pytest_configure() -> None:
    """Hand the kernels an environment of their own."""
    for name in os.environ.keys() - environment(Path(_SCRATCH.name)).keys():
        del os.environ[name]
    os.environ.update(environment(Path(_SCRATCH.name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a notebook that leaves a process behind."""
    mark = f"{os.getpid()}-{item.nodeid}"
    os.environ["NOTEBOOK_UNDER_TEST"] = mark
    try:
        yield
    finally:
        del os.environ["NOTEBOOK_UNDER_TEST"]
    _, alive = psutil.wait_procs(list(_marked(mark)), timeout=10)
    assert not alive, f"{item.nodeid} left running: {alive}"


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Yield the processes that inherited the mark: what the notebook started."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("NOTEBOOK_UNDER_TEST") == mark:
                yield process
        except psutil.Error:
            pass
