"""Is this machine fit for ``make setup``? If not, one line says what to do.

    python3 tools/machine.py

Before the installation nothing else is there, and any Python 3 must be able to read this.
"""

import os
import platform
import re
import shutil
import sys
from pathlib import Path

# Measured on Linux x86_64, whose PyTorch is the CUDA build: 6.1 GB; 2.1 GB of that without CUDA's
# and Triton's packages. Added: what imports leave as bytecode, the data set, a run's results.
CUDA_GB, PLAIN_GB = 7.0, 3.0


def check() -> None:
    """Look at Python, at the folder, and at the disks that the installation fills.

    Raises:
        SystemExit: With one line, if something is in the way.
    """
    version = tuple(sys.version_info[:2])
    if not (3, 11) <= version < (3, 15):
        sys.exit(
            "Python: expected 3.11 to 3.14, got {}.{}; try: make PYTHON=python3.12".format(*version)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit("Python: expected the venv module; on Debian: apt install python3-venv")
    strange = re.search(r"[^\w@%+=:,./\\-]", str(Path.cwd()))
    if strange:
        sys.exit(
            f"folder: expected a path without spaces and signs that a shell takes for its own "
            f"(Ray starts its processes through one), got {strange.group()!r} in "
            f"{str(Path.cwd())!r}; move the folder"
        )
    cuda = sys.platform == "linux" and platform.machine() == "x86_64"
    needed = CUDA_GB if cuda and os.environ.get("UV_TORCH_BACKEND") != "cpu" else PLAIN_GB
    for folder in (Path.cwd(), Path.home()):  # uv downloads into the second
        free = shutil.disk_usage(str(folder)).free / 1e9
        if free < needed:
            sys.exit(
                f"disk of {folder}: expected {needed:g} GB free for the installation, "
                f"got {free:.1f} GB; free some space"
            )


if __name__ == "__main__":
    check()
