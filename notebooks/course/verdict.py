"""How an exercise is checked: one line that says right, not yet, or what is off and by how much.

A check never raises, so a notebook runs on; and it says what is wrong, not how to put it right.
"""

import ast
import dis
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from course.draw import WatchedGrid, draw
from course.setup import show
from fedlib.errors import one_line

Answer = Any
"""A function that the learner wrote, or a value; ``None`` or ``...`` means: not yet."""


LONGEST = 300  # letters of an answer that are shown
NOT_YET = "Fill in the cell above, run it, then run this one again."
Grid = TypeVar("Grid", bound=WatchedGrid)
_watched_grids: list[WatchedGrid] = []


class _NotYetError(Exception):
    """The stub is untouched, or what was written returns nothing: ``args`` has what came."""


class _OffError(Exception):
    """The answer is wrong; the text says where."""


class Check(Protocol):
    """What ``check`` makes of a function: a check, to be called with an answer."""

    __name__: str

    def __call__(self, answer: Answer, otherwise: Answer = None) -> Answer:
        """Say whether the answer is right; return it if so, else ``otherwise``, if that is given.

        With ``otherwise``, it also says which of the two the cells below will use.
        """


def check(body: Callable[[Answer], None]) -> Check:
    """Make a check of a function that calls ``expect`` and returns if all was right."""
    name = body.__name__

    @functools.wraps(body)
    def checked(answer: Answer, otherwise: Answer = None) -> Answer:
        title, right = getattr(answer, "__name__", name), False
        _watched_grids.clear()
        try:
            if answer is None or answer is ...:
                raise _NotYetError(answer)
            body(_watched(answer) if callable(answer) else answer)
        except (_NotYetError, NotImplementedError) as missing:
            if missing.args == (None,) and _is_written(answer):
                print(f"❌ {title}: it returned nothing. Is there a `return`?")
            else:
                _watched_grids.clear()  # there is no loop yet whose messages could be seen
                print(f"⏳ {title}: not yet. {NOT_YET}")
        except _OffError as off:
            print(f"❌ {title}: {off}")
        except (Exception, SystemExit) as error:  # the learner's own code raised
            print(f"❌ {title}: it raised {type(error).__name__}: {one_line(error)}")
        else:
            print(f"✅ {title}: right.")
            _watched_grids.clear()
            right = True
        if _watched_grids:
            print("   To see the messages and what came back: checks.show_messages()")
        if otherwise is None:
            return None
        print(f"   The cells below use {'yours' if right else 'ours'}.")
        return answer if right else otherwise

    return checked


def watch(grid: Grid) -> Grid:
    """Keep a grid on which an answer is tried, to be drawn if the answer is wrong."""
    _watched_grids[:] = [grid]
    return grid


def show_messages() -> None:
    """Draw the messages of the last check, if its answer was wrong."""
    for grid in _watched_grids:
        title = "The messages of the last check, and what came back"
        show(draw(grid, title), "A lane for the server and for each node, an arrow for a message.")
    if not _watched_grids:
        print(
            "Nothing to show: the last check sent no messages over a grid, or found nothing wrong."
        )


def _watched(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Return the function, refused where it changes what it was given."""

    @functools.wraps(function)
    def watched(*given: Any, **named: Any) -> Answer:
        values = [*given, *named.values()]
        before = [(_contents(value), _fingerprint(value)) for value in values]
        got = function(*given, **named)
        for (old, fingerprint), value in zip(before, values, strict=True):
            if _fingerprint(value) != fingerprint:
                new = _contents(value)
                change = f"{_shortened(old)} to {_shortened(new)}"
                raise _OffError(f"it changes its argument {change}. The caller still needs it.")
        return got

    return watched


def _is_written(function: Any) -> bool:
    """Does a function do anything, and does no line of it say ``...`` any more?"""
    code = getattr(function, "__code__", None)
    if code is None:  # a value, or something made with care
        return callable(function)
    nothing = {"RESUME", "NOP", "POP_TOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}
    try:
        lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    except (OSError, TypeError):  # no source, as of a function made by exec
        lines = []
    does = {instruction.opname for instruction in dis.get_instructions(code)}
    return not does <= nothing and "..." not in lines


def _contents(value: Any) -> str:
    """Say what a container holds; of anything else, such as a context, nothing."""
    is_data = isinstance(value, (dict, list)) or hasattr(value, "dtype")
    return one_line(repr(value)) if is_data else ""


def _fingerprint(value: Any) -> Any:
    """Return what tells two contents apart, to the last bit; of a context and such, nothing."""
    if isinstance(value, torch.Tensor):
        return bytes(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(repr(key), _fingerprint(entry) or repr(entry)) for key, entry in value.items()]
    if isinstance(value, list):
        return [_fingerprint(entry) or repr(entry) for entry in value]
    return _contents(value)


def expect(
    question: str, got: Any, wanted: Any, hint: str = "", slips: Mapping[str, Any] | None = None
) -> None:
    """Compare an answer with what is right.

    Args:
        question: What was asked, "two clients, 1 and 3 examples".
        got: What the learner's code gave.
        wanted: A number, text, tensor or array, or a sequence or mapping of these.
        hint: A question that helps, without the answer in it.
        slips: Names of likely mistakes, and what they give; such a name stands for the hint.
    """
    if got is None or got is ...:
        raise _NotYetError(got)
    got = float(got) if isinstance(got, Fraction) else got
    got = got.detach() if isinstance(got, torch.Tensor) else got
    for kind, name in ((Mapping, "a dictionary"), (str, "a text"), (Set, "a set")):
        if isinstance(wanted, kind) and not isinstance(got, kind):
            raise _OffError(f"{question}: expected {name}, got {type(got).__name__}.")
    if difference := _difference(got, wanted):
        named = (slip for slip, value in (slips or {}).items() if not _difference(got, value))
        hint = next(named, hint)
        raise _OffError(f"{question}: {difference}." + (f" {hint}" if hint else ""))


@contextmanager
def on_error(kind: type[Exception] | tuple[type[Exception], ...], hint: str) -> Iterator[None]:
    """Add a hint to an error that the learner's code is likely to raise here."""
    try:
        yield
    except (_NotYetError, _OffError):  # a verdict already
        raise
    except kind as error:
        said = one_line(error).rstrip(".")
        raise _OffError(f"it raised {type(error).__name__}: {said}. {hint}") from error


def elsewhere(function: Callable[[], Answer]) -> Answer:
    """Return what a function gives in a new process, whose ``hash`` of a text is another."""
    from ray import cloudpickle  # takes a second

    code = (
        "import sys; from ray import cloudpickle\n"
        "print('', repr(cloudpickle.load(sys.stdin.buffer)()), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "17"}
    process = [sys.executable, "-c", code]
    given = cloudpickle.dumps(function)  # type: ignore[no-untyped-call]
    done = subprocess.run(process, input=given, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"in a new process: {done.stderr.decode().splitlines()[-1]}")
    return ast.literal_eval(done.stdout.decode().splitlines()[-1])


def _difference(got: Any, wanted: Any) -> str:
    """Say how ``got`` differs from ``wanted``, or nothing where it does not (to six digits)."""
    if isinstance(wanted, Mapping):
        if not isinstance(got, Mapping) or set(got) != set(wanted):
            came = sorted(map(str, got)) if isinstance(got, Mapping) else type(got).__name__
            return f"expected the keys {sorted(map(str, wanted))}, got {came}"
        parts = ((f"{key}: ", _difference(got[key], wanted[key])) for key in wanted)
        return next((key + text for key, text in parts if text), "")
    if isinstance(wanted, (bool, str, set)) or not _is_numeric(wanted):
        got = got.tolist() if isinstance(got, np.ndarray) else got
        return "" if got == wanted else f"expected {wanted!r}, got {repr(got)[:LONGEST]}"
    if not _is_numeric(got):
        return f"expected numbers, got {type(got).__name__}"
    a, b = np.asarray(wanted, dtype=float), np.asarray(got, dtype=float)
    if a.shape != b.shape:
        return f"expected the shape {a.shape}, got {b.shape}"
    if np.allclose(b, a, rtol=1e-6, atol=1e-9, equal_nan=True):
        return ""
    if a.ndim == 0:
        return f"expected {float(a):.6g}, got {float(b):.6g}, off by {float(b - a):+.3g}"
    if all(np.asarray(value).dtype.kind in "iu" for value in (wanted, got)):  # indices, mostly
        return f"expected {_short(np.asarray(wanted))}, got {_short(np.asarray(got))}"
    return f"expected {_short(a)}, got {_short(b)}, off by up to {np.max(np.abs(b - a)):.3g}"


def _is_numeric(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "iufb"
    except (ValueError, TypeError, RuntimeError):
        return False


def _short(array: Any) -> str:
    lines = np.array2string(array, precision=4, threshold=8, separator=", ")
    return _shortened(one_line(lines))  # a verdict is one line


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + " …"
