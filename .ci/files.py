"""Is every notebook valid, and no file too large? ``python .ci/files.py [FILE ...]``.

Without names: every file that .gitignore leaves, in a repository or in a folder without git.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from pathspec import PathSpec

# Bytes; a notebook carries its pictures, a parquet file all of Fashion-MNIST.
LIMIT, LIMITS = 500_000, {".ipynb": 600_000, ".parquet": 30_000_000}


def files() -> Iterator[Path]:
    """Return the files below this folder that git would keep."""
    ignore = Path(".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = PathSpec.from_lines("gitignore", [".git", *ignore]).match_file
    for folder, folders, names in os.walk("."):
        folders[:] = [name for name in folders if not ignored(f"{Path(folder, name).as_posix()}/")]
        paths = (Path(folder, name) for name in names)
        yield from (path for path in paths if not ignored(path.as_posix()))


def problems(path: Path) -> Iterator[str]:
    """Say in a line each what is wrong with a file."""
    if not path.is_file():
        yield f"{path}: expected a file, found none"
        return
    limit = LIMITS.get(path.suffix, LIMIT)
    if (size := path.stat().st_size) >= limit:
        yield (
            f"{path}: expected less than {limit / 1000:.0f} kB, got {size / 1000:.0f} kB; "
            f"draw fewer or smaller pictures, or leave the file out"
        )
    if path.suffix == ".ipynb":
        try:
            with warnings.catch_warnings(action="error"):  # a cell without an id is one
                nbformat.validate(nbformat.from_dict(json.loads(path.read_text("utf-8"))))
        except Exception as error:  # whatever a broken file leads nbformat to
            reason = str(error).strip().partition("\n")[0][:200]
            yield f"{path}: expected a valid notebook, got: {reason}; save it from JupyterLab"


def main(names: Sequence[str]) -> int:
    """Check the files named, or all; return the exit status."""
    found = [line for path in map(Path, names) for line in problems(path)]
    if not names:
        found = [line for path in files() for line in problems(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
