"""What fedlib raises. Every text is one line: who, what was expected, what came, what to do."""


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


def one_line(text: object) -> str:
    """Return a text, usually somebody else's exception, with its line breaks made spaces."""
    return " ".join(str(text).split())
