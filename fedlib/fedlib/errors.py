"""What fedlib raises. Every text is one line: who, what was expected, what came, what to do."""

import os
import traceback
from pathlib import Path


class FedlibError(Exception):
    """Something that a person can put right; the base of all errors that fedlib raises."""


class ConfigError(FedlibError):
    """A run-config key is unknown, or its value is outside the accepted range."""


class DataError(FedlibError):
    """A data set cannot be found, read or partitioned."""


class ReplyError(FedlibError):
    """A message lacks a record, or carries one that cannot be used."""


class RunDirectoryError(FedlibError):
    """A run directory cannot be written, read or resumed from."""


class TooLateError(FedlibError):
    """A message has expired, or will have before it can be answered."""


HERE = str(Path(__file__).parent)
LIBRARIES = (str(Path(os.__file__).parent), "site-packages", "dist-packages")


def describe(error: BaseException) -> str:
    """Return an exception as one line, with the last place in a person's own code or in ours."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _is_own(frame.filename):
            file = "<cell>" if "ipykernel_" in frame.filename else Path(frame.filename).name
            where = f" ({file}, line {frame.lineno}, in {frame.name})"
    return one_line(f"{type(error).__name__}: {error}{where}")


def _is_own(filename: str) -> bool:
    return HERE in filename or not any(part in filename for part in LIBRARIES)


def one_line(text: object) -> str:
    """Return a text, usually somebody else's exception, with its line breaks made spaces."""
    return " ".join(str(text).split())
