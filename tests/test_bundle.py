"""What ``flwr run`` sends to the SuperLink and to every node: the app, and nothing else."""

import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.cli.app import app as flwr_app  # Flower's command line has no public name
from typer.testing import CliRunner

APP = Path(__file__).parents[1] / "fedlib"
LIMIT = 250_000  # bytes; Flower does not compress: they are the characters of the source


def build(folder: Path) -> Path:
    """Return the bundle, whose name ends with the first digits of its hash."""
    done = CliRunner().invoke(flwr_app, ["build", "--app", str(folder)])
    assert done.exit_code == 0, done.output
    [bundle] = Path.cwd().glob("*.fab")
    return bundle.rename(bundle.with_suffix(".zip"))


def test_the_bundle_is_small_and_what_a_run_leaves_does_not_travel_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = shutil.copytree(APP, tmp_path / "fedlib", ignore=shutil.ignore_patterns("__pycache__"))
    before = build(app)
    names = zipfile.ZipFile(before).namelist()
    size = before.stat().st_size
    print(f"{before.name}: {size:,} bytes\n{names}")
    assert size < LIMIT
    assert "fedlib/server_app.py" in names and "pyproject.toml" in names
    assert {Path(name).suffix for name in names} == {".py", ".toml", ".md", ""}  # no parquet

    content = before.read_bytes()
    before.unlink()
    for left in (
        "outputs/2026-01-01/00-00-00/results.json",
        "outputs/2026-01-01/00-00-00/run_config.json",
        "wandb/x.json",
        "fedlib/__pycache__/model.cpython-311.pyc",
    ):
        (app / left).parent.mkdir(parents=True, exist_ok=True)
        (app / left).write_text("{}", encoding="utf-8")
    after = build(app)
    assert after.name == before.name
    assert after.read_bytes() == content
