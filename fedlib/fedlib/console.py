"""The round log: plain lines on standard output.

A logger of our own, because Flower's writes to standard error, which notebooks show in red.
"""

import logging
import sys

from fedlib.errors import FedlibError

TOLD_ELSEWHERE = ("Message TTL has expired", "a message by RayBackend", "The actor ")

logger = logging.getLogger("fedlib")


class StdoutHandler(logging.Handler):
    """Writes to what ``sys.stdout`` is at that moment: notebooks and Flower replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        text = self.format(record) + "\n"
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # A console without emoji (Windows, code page 1252) gets question marks, not a crash.
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def say(line: str) -> None:
    """Write one line to the round log."""
    if not any(isinstance(handler, StdoutHandler) for handler in logger.handlers):
        logger.addHandler(StdoutHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logger.info(line)


def tidy_flower_log() -> None:
    """Keep three things out of Flower's log that would bury the round log.

    An ERROR line for every reply that comes too late: a late node is part of the plan here. The
    traceback of a ``FedlibError``, whose one line says what to do. And what a simulation says,
    in three records, of a client process that died: the round log names the node.
    """
    logging.getLogger("flwr").addFilter(_tidy)  # a second time changes nothing


def _tidy(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], FedlibError):
        record.exc_info = None
    return not any(words in record.getMessage() for words in TOLD_ELSEWHERE)
