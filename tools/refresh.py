"""Execute notebooks, and keep of their outputs what a reader should see: ``make notebooks``.

They are executed without network and without an account, so that everybody gets the same outputs.
What differs from run to run or from machine to machine (paths, the time of day, progress bars) is
left out, and pictures are made small. Each notebook is stamped with a digest of its code;
``tests/test_notebooks.py`` compares them.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image, ImageChops

from address import HERE, METADATA, is_colab
from fedlib import open_dataset

CELL_TIMEOUT_S = 600
MAX_DIFFERENCE = 8
"""Of 255: by how much a palette may change a pixel's red, green or blue."""
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
MARK = "NOTEBOOK_UNDER_TEST"
"""Environment variable by which the processes of one notebook are found again."""
COST = re.compile(r"Computing time: (\d+) s on two cores\.")
PATHS = (  # what a path becomes in a saved output
    (re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d(-\d+)?"), "<date>/<time>"),
    (re.compile(r"offline-run-\d{8}_\d{6}-\w+"), "offline-run-<time>-<id>"),
    (re.compile(re.escape(f"{HERE}{os.sep}")), ""),
    (re.compile(re.escape(f"{HERE.parent}{os.sep}")), ""),
    (re.compile(r'(?<=")[^"\s]*[\\/]site-packages[\\/]'), ""),
    (re.compile(r'(?<=")[^"\s]*ipykernel_\d+[\\/]\d+\.py'), "<cell>"),
)


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment in which a notebook needs neither network nor account.

    Args:
        scratch: An empty folder, where a cache and a login would be looked for.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_MODE")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch), "NETRC": str(scratch / "none")}
    return kept | offline | {"FLWR_TELEMETRY_ENABLED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def execute(notebook: NotebookNode, env: dict[str, str]) -> None:
    """Execute every cell in a fresh kernel, in the folder of the notebooks; outputs in place.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3")
    client.resources = {"metadata": {"path": str(HERE)}}
    asyncio.run(client.async_execute(env=env))


def left_running(mark: str) -> list[str]:
    """Return the command lines of what was started with the variable ``MARK`` and still runs.

    Args:
        mark: The variable's value; processes inherit it, whoever their parent is by now.
    """
    _, alive = psutil.wait_procs([p for p in psutil.process_iter() if _mark(p) == mark], timeout=10)
    return [" ".join(process.cmdline()) for process in alive]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def tidy(notebook: NotebookNode) -> None:
    """Leave out of the outputs what is different each time, or of no use to a reader."""
    widgets = notebook.metadata.pop("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    pictures = [
        output
        for widget in widgets.values()
        for output in widget["state"].get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    for cell in notebook.cells:
        tags = {k: v for k, v in cell.metadata.items() if k == "tags"}
        cell.metadata = nbformat.from_dict(METADATA) if is_colab(cell) else tags
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):  # a slider is saved as the picture that it shows
                shown, pictures = pictures[:1], pictures[1:]
                kept += [nbformat.v4.new_output("display_data", **_data(p)) for p in shown]
            elif output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text  # how a stream is cut into pieces is chance
            else:
                kept.append(output)
        cell.outputs = [_tidied(output) for output in kept]


def _data(picture: Any) -> dict[str, Any]:
    return {"data": picture["data"], "metadata": picture.get("metadata", {})}


def _tidied(output: Any) -> Any:
    if output.output_type == "stream":
        output.text = _without_paths(output.text)
    for mime, value in output.get("data", {}).items():
        if mime.startswith("text/"):
            output.data[mime] = _without_paths("".join(value))
        elif mime == "image/png":
            output.data[mime] = base64.b64encode(small(base64.b64decode(value))).decode()
    return output


def _without_paths(text: str) -> str:
    for pattern, replacement in PATHS:
        text = pattern.sub(replacement, text)
    return text


def small(png: bytes) -> bytes:
    """Return a picture with a palette of 256 colours, or itself where one would see that."""
    image = Image.open(io.BytesIO(png))
    opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
    if not opaque and image.mode != "RGB":
        return png
    plain = image.convert("RGB")
    coded = plain.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    difference = ImageChops.difference(plain, coded.convert("RGB"))
    if difference.point(lambda value: 255 * (value > MAX_DIFFERENCE)).getbbox():
        return png
    buffer = io.BytesIO()
    coded.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stamp(notebook: NotebookNode) -> str:
    """Return the digest of a notebook's code, Colab's cell aside."""
    code = "\n".join(cell.source for cell in code_cells(notebook) if not is_colab(cell))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def refresh(path: Path) -> str:
    """Execute one notebook and write it back; return how long it took."""
    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        execute(notebook, environment(Path(scratch)))
    took = time.monotonic() - began
    tidy(notebook)
    line = f"Computing time: {max(5, 5 * round(took / 5))} s on two cores."
    for cell in notebook.cells:
        cell.source = COST.sub(line, cell.source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "stamp": stamp(notebook),
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return f"{path.name}: {line} ({took:.0f} s, {path.stat().st_size / 1000:.0f} kB)"


def main(arguments: Sequence[str]) -> None:
    """Refresh the notebooks named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Execute the notebooks in place.")
    parser.add_argument("names", nargs="*", help="such as 05-one-round.ipynb; none: all")
    names = parser.parse_args(arguments).names
    paths = sorted(HERE.glob("[0-9][0-9]-*.ipynb"))
    if strange := sorted(set(names) - {path.name for path in paths}):
        sys.exit(f"ONLY: expected a name such as 05-one-round.ipynb, got {', '.join(strange)}")
    open_dataset()  # so that every log says that the data come from the cache
    for path in paths:
        if not names or path.name in names:
            print(refresh(path), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
