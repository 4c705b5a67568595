"""The round log: plain lines on standard output.

A logger of our own, because Flower's writes to standard error, which notebooks show in red.
"""

import logging
import sys

from fedlib.errors import FedlibError

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
    """Keep out of Flower's log what would bury the round log.

    That is an ERROR line for every reply that comes too late: a late node is part of the plan here;
    the traceback of a ``FedlibError``, whose one line says what to do; and most of the three
    records, a hundred lines, by which a simulation says that a client raised or died.
    """
    logging.getLogger("flwr").addFilter(_tidy)  # a second time changes nothing


def _tidy(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], FedlibError):
        record.exc_info = None
    if record.levelno >= logging.ERROR and record.funcName in ("worker", "process_message"):
        return _is_clients_error(record)
    return "Message TTL has expired" not in record.getMessage()


def _is_clients_error(record: logging.LogRecord) -> bool:
    """Leave the traceback of a client's own code, or one line of a process that died.

    Of the three records, the one with the exception is known by its type.
    """
    kinds = {kind.__name__ for kind in type(record.msg).__mro__}  # a node may have no Ray to import
    if "RayTaskError" in kinds:
        # The paragraph of the error that came first, without Ray's title of it.
        own = str(record.msg).partition("\n\n")[0].splitlines()[1:]
        record.msg = "\n".join(["A client raised:", *(x for x in own if x.strip(" ^~"))])
    elif "RayActorError" in kinds:
        record.msg = "A client process died; the message that it had is lost."
    return "Exception" in kinds
