"""``make lab`` serves JupyterLab and the notebooks."""

import json
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import refresh

START_S = 120


def test_jupyterlab_as_make_lab_starts_it_opens_the_notebooks_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    mark, repository = uuid.uuid4().hex, refresh.HERE.parent
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    [arguments] = re.findall(r"^\t\$\(BIN\)/jupyter lab (.*)$", makefile, re.M)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={mark}", *arguments.split()]
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = refresh.environment(tmp_path) | own | {refresh.MARK: mark}
    server = subprocess.Popen(command, cwd=repository, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not (files := list((tmp_path / "RUNTIME").glob("jpserver-*.json"))):
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.5)
        time.sleep(1)  # until the file is written
        url = json.loads(files[0].read_text(encoding="utf-8"))["url"]

        def get(path: str) -> str:
            request = Request(url + path, headers={"Authorization": f"token {mark}"})
            with urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())

        for path in sorted(refresh.HERE.glob("[0-9][0-9]-*.ipynb")):
            assert "jupyter-config-data" in get(f"lab/tree/notebooks/{path.name}")
            assert json.loads(get(f"api/contents/notebooks/{path.name}"))["type"] == "notebook"
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert refresh.left_running(mark) == []
