"""The notebooks' folded solutions, and what becomes of them with some pieces exchanged."""

from collections.abc import Mapping

from test_notebooks import NOTEBOOKS, read, solution_code, tagged


def solution(number: str, exercise: int) -> str:
    """The code of a notebook's folded solution."""
    [path] = (path for path in NOTEBOOKS if path.stem.startswith(number))
    return solution_code(tagged(read(path), "solution")[exercise])


def changed(code: str, changes: Mapping[str, str]) -> str:
    """The code with pieces exchanged, each of which stands in it once."""
    for old, new in changes.items():
        assert code.count(old) == 1, f"{old!r} stands {code.count(old)} times in the solution"
        code = code.replace(old, new)
    return code
