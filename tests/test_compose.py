"""compose.yaml, as far as it can be checked without an engine."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlib.credentials import make_credentials
from test_commands import parse

REPOSITORY = Path(__file__).resolve().parent.parent
FILE = REPOSITORY / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
NODES = [f"supernode-{n}" for n in range(3)]
each_node = pytest.mark.parametrize("name", NODES)


def command(name: str) -> dict[str, Any]:
    """What the program of a service understands of its command."""
    return parse(shlex.join(SERVICES[name]["command"]))


def mounts(name: str) -> dict[str, str]:
    """What is mounted where: source by path inside the container."""
    found = {}
    for volume in SERVICES[name]["volumes"]:
        source, target, *_ = re.sub(r":\?[^}]*}", "}", volume).split(":")
        found[target] = source
    return found


def test_it_follows_the_compose_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_one_superlink_and_a_supernode_for_each_partition() -> None:
    assert list(SERVICES) == ["superlink", *NODES]
    shares = [command(name)["node_config"] for name in NODES]
    assert shares == [f"partition-id={n} num-partitions=3" for n in range(3)]


def test_everything_is_pinned_to_what_the_app_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "fedlib" / "pyproject.toml").read_text("utf-8"))
    version = project["project"]["version"]
    [flwr] = [d for d in project["project"]["dependencies"] if d.startswith("flwr[")]
    for service in SERVICES.values():
        assert service["image"] == f"fedlib:{version}-flwr{flwr.partition('==')[2]}"
        [base] = re.findall(r"^FROM (\S+)$", service["build"]["dockerfile_inline"], re.MULTILINE)
        assert re.fullmatch(r"python:3\.1[1-3]\.\d+-slim-bookworm", base)
        assert service["build"]["context"] == "fedlib"


def test_one_port_is_published_and_on_this_machine_only() -> None:
    assert SERVICES["superlink"]["ports"] == [f"127.0.0.1:8000:{command('superlink')['port']}"]
    assert command("superlink")["host"] == "0.0.0.0"  # within the containers' network
    assert not any("ports" in SERVICES[name] for name in NODES)


@each_node
def test_a_supernode_calls_the_superlink_by_a_name_that_its_certificate_has(name: str) -> None:
    assert command(name)["superlink"] == f"superlink:{command('superlink')['port']}"
    assert "--host superlink" in FILE.read_text(encoding="utf-8")
    assert command(name)["insecure"] is False
    assert SERVICES[name]["depends_on"] == {"superlink": {"condition": "service_healthy"}}


def test_the_superlink_speaks_tls_and_knows_its_nodes() -> None:
    given = command("superlink")
    assert given["insecure"] is False and given["enable_supernode_auth"] is True
    for key in ("ssl_ca_certfile", "ssl_certfile", "ssl_keyfile"):
        assert given[key] in mounts("superlink")
    assert Path(given["database"]).parent == Path("/state") and "/state" in mounts("superlink")


@each_node
def test_a_node_gets_its_own_key_and_no_other(name: str) -> None:
    given, number = command(name), name.rpartition("-")[2]
    key = given["auth_supernode_private_key"]
    assert mounts(name)[key] == f"${{FEDLIB_CREDENTIALS}}/node-{number}"
    assert given["root_certificates"] in mounts(name)
    secrets = {s for s in mounts(name).values() if s.startswith("${FEDLIB_CREDENTIALS}")}
    assert secrets == {f"${{FEDLIB_CREDENTIALS}}/{file}" for file in ("ca.crt", f"node-{number}")}


def test_the_credentials_that_it_mounts_are_those_that_are_made(tmp_path: Path) -> None:
    made = make_credentials(tmp_path / "credentials", 3, ["superlink"])
    for name in SERVICES:
        for target, source in mounts(name).items():
            if source.startswith("${FEDLIB_CREDENTIALS"):
                assert (made.folder / source.partition("}/")[2]).is_file()
                assert f"{target}:ro" in " ".join(SERVICES[name]["volumes"])


def test_every_volume_is_declared_and_no_two_nodes_share_one() -> None:
    named = [s for name in SERVICES for s in mounts(name).values() if not s.startswith("$")]
    assert sorted(named) == sorted(COMPOSE["volumes"])
    assert len(set(named)) == len(named)


def test_the_folders_that_are_written_are_volumes_and_made_for_any_user() -> None:
    for name, service in SERVICES.items():
        dockerfile = service["build"]["dockerfile_inline"]
        [made] = re.findall(r"install -d -m 0777 (.*)", dockerfile)
        assert {"/cache", "/state", "/outputs"} == set(made.split())
        assert service["environment"]["FLWR_HOME"] in made.split()
        assert service["environment"]["FEDLIB_CACHE_DIR"] in mounts(name)


def test_the_health_check_is_python_and_asks_over_tls() -> None:
    kind, program, flag, code = SERVICES["superlink"]["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python", "-c")
    compile(code, "healthcheck", "exec")
    assert (
        "https://localhost:8000/health" in code and command("superlink")["ssl_ca_certfile"] in code
    )


def test_no_secret_is_in_what_git_keeps(tmp_path: Path) -> None:
    key = re.compile(rb"PRIVATE KEY-----(\\n|\s)+[A-Za-z0-9+/=]{20}")
    made = make_credentials(tmp_path / "credentials", 1)
    assert all(key.search(path.read_bytes()) for path in (made.key, *made.node_keys))
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_file():
            assert not key.search(path.read_bytes()), name
