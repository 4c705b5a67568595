"""Make a lab's saved results anew: ``labs.py one_more_record``, or without a name, all of them."""

import importlib
import sys
import time
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def names() -> list[str]:
    """Return the experiments there are."""
    files = sorted((NOTEBOOKS / "course" / "labs").glob("[!_]*.py"))
    return [file.stem for file in files]


def main(wanted: list[str]) -> None:
    """Run the experiments named, one after the other."""
    sys.path.insert(0, str(NOTEBOOKS))
    if unknown := set(wanted) - set(names()):
        sys.exit(f"labs: expected names of {', '.join(names())}, got {', '.join(sorted(unknown))}")
    labs = importlib.import_module("course.labs")
    for name in wanted or names():
        began = time.monotonic()
        result = importlib.import_module(f"course.labs.{name}").experiment()
        seconds = time.monotonic() - began
        print(f"{labs.save(name, result, seconds)}: {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
