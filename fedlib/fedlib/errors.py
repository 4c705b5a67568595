"""What fedlib raises, and why.

    FedlibError             anything that a person can put right; its text is one clear line
    ├── ConfigError         a run-config value outside its accepted range
    ├── DataError           a dataset that cannot be found, read, partitioned or split
    ├── ReplyError          a message whose content is not what was agreed
    ├── RunDirectoryError   a run directory that cannot be written, read or resumed
    └── TooLateError        a message that expires before it can be answered (client side)

Every message says who, what was expected, what came, and what to do.
"""


def one_line(text: object) -> str:
    """Return a text, usually somebody else's exception, with its line breaks made spaces."""
    return " ".join(str(text).split())


class FedlibError(Exception):
    """Base of all errors that fedlib raises on purpose."""


class ConfigError(FedlibError):
    """A run-config key is unknown, or its value is outside the accepted range."""


class DataError(FedlibError):
    """A dataset cannot be found, read, partitioned or split."""


class ReplyError(FedlibError):
    """A message lacks a record, or carries one that cannot be used."""


class RunDirectoryError(FedlibError):
    """A run directory cannot be written, read or resumed from."""


class TooLateError(FedlibError):
    """A message has expired, or will have before it can be answered."""
