"""``pytest --nbmake notebooks``: without network or account, and nothing may keep running."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from refresh import MARK, environment, left_running

_SCRATCH = tempfile.TemporaryDirectory(prefix="notebooks-")


def pytest_configure() -> None:
    """Hand the kernels an environment of their own."""
    offline = environment(Path(_SCRATCH.name))
    for name in os.environ.keys() - offline.keys():
        del os.environ[name]
    os.environ.update(offline)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a notebook that leaves a process behind."""
    mark = f"{os.getpid()}-{item.nodeid}"
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]
    alive = left_running(mark)
    assert not alive, f"{item.nodeid} left running: {alive}"
