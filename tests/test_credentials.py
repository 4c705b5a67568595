"""The credentials: OpenSSL and ssh-keygen's format read what Python wrote."""

import os
import shutil
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlib import FedlibError, credentials
from fedlib.credentials import Credentials, make_credentials, write_node_key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    folder = tmp_path_factory.mktemp("new") / "deep" / "credentials"
    return make_credentials(folder, 2, ["superlink", "127.0.0.1"])


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def hosts(path: Path) -> set[str]:
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(name.value) for name in names.value}


def test_the_authority_signed_itself_and_the_certificate_of_this_key_and_these_hosts(
    made: Credentials,
) -> None:
    ca, server = certificate(made.ca), certificate(made.certificate)
    for signed, is_ca in ((ca, True), (server, False)):
        signed.verify_directly_issued_by(ca)
        constraints = signed.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.value.ca == is_ca
    assert server.not_valid_before_utc < datetime.now(UTC) < server.not_valid_after_utc
    assert hosts(made.certificate) == {"superlink", "127.0.0.1"}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)  # raises if the key is another's


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to ask")
def test_openssl_agrees(made: Credentials) -> None:
    command = ["openssl", "verify", "-x509_strict", "-verify_hostname", "superlink"]
    command += ["-CAfile", str(made.ca), str(made.certificate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_node_has_a_key_pair_of_its_own_and_the_authoritys_key_is_nowhere(
    made: Credentials,
) -> None:
    private = [path for path in made.folder.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(private) == sorted([made.key, *made.node_keys])
    keys: list[Any] = [load_pem_private_key(made.key.read_bytes(), None).public_key()]
    for path in made.node_keys:
        keys.append(load_ssh_private_key(path.read_bytes(), None).public_key())
        assert keys[-1] == load_ssh_public_key(path.with_name(path.name + ".pub").read_bytes())
        assert keys[-1].curve.name == "secp384r1"
    keys.append(certificate(made.ca).public_key())
    assert len({key.public_numbers() for key in keys}) == 1 + 2 + 1


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_private_files_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        made = make_credentials(tmp_path / "credentials", 1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in made.folder.iterdir()}
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    private = {"server.key": 0o600, "node-0": 0o600}
    assert modes == {"ca.crt": 0o644, "server.pem": 0o644, "node-0.pub": 0o644} | private


def test_nothing_is_overwritten_and_a_folder_that_cannot_be_is_one_line(made: Credentials) -> None:
    before = made.key.read_bytes()
    with pytest.raises(FedlibError, match=r"expected an empty folder, got .* choose another"):
        make_credentials(made.folder, 2)
    with pytest.raises(FileExistsError):
        write_node_key(made.node_keys[0])
    assert made.key.read_bytes() == before
    with pytest.raises(FedlibError, match="credentials: expected a folder to write to, got: "):
        make_credentials(made.key / "credentials", 1)


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("2001:DB8::1", "2001:db8::1"),
        ("*.example.org", "*.example.org"),
        ("fl_server", "fl_server"),  # as Docker Compose allows
        ("a" * 63 + ".10x", "a" * 63 + ".10x"),
        ("münchen.example", "xn--mnchen-3ya.example"),  # RFC 3492's algorithm, with other tools
        ("*.Straße.example", "*.xn--strae-oqa.example"),  # IDNA 2008; of 2003, it was strasse
    ],
)
def test_a_name_or_an_address_is_written_as_clients_look_for_it(
    host: str, written: str, tmp_path: Path
) -> None:
    assert hosts(make_credentials(tmp_path / "new", 0, [host]).certificate) == {written}


@pytest.mark.parametrize(
    "host",
    [
        "https://superlink.example.org:8000",
        *("host:8000", "", "a b", " host", "host\n", "[::1]", "256.1.1.1", "10.0.0", "1.2.3.4:80"),
        *("-host", "host-", "a..b", ".a", "a.", "a" * 64, ".".join(["a" * 60] * 5), "münchen:80"),
        *("*", "*.org", "a.*.example.org", "f*.example.org", "*.*.example.org", "mün chen.example"),
    ],
)
def test_a_host_that_no_client_could_match_is_refused_and_nothing_is_written(
    host: str, tmp_path: Path
) -> None:
    with pytest.raises(FedlibError) as refusal:
        make_credentials(tmp_path / "new", 1, ["superlink", host])
    assert str(refusal.value) == (
        "credentials: expected a host's name (superlink.example.org) or IP address, without "
        f"https://, port or brackets, got {host!r}"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("num_nodes", "names"), [(-2, ["superlink"]), (1, [])])
def test_fewer_than_no_nodes_and_no_hosts_are_refused(
    num_nodes: int, names: list[str], tmp_path: Path
) -> None:
    expected = f"one or more hosts and 0 or more nodes, got {len(names)} hosts and {num_nodes} node"
    with pytest.raises(FedlibError, match=expected):
        make_credentials(tmp_path / "new", num_nodes, names)
    assert not (tmp_path / "new").exists()


def test_the_program_makes_them_for_this_machine_and_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "credentials"
    arguments = [str(folder), "--nodes", "3", "--host", "superlink", "--host", "10.0.0.7"]
    command = [sys.executable, "-m", "fedlib.credentials", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert "3 node keys" in done.stdout
    this_machine = {"localhost", "127.0.0.1", "::1"}
    assert hosts(folder / "server.pem") == {"superlink", "10.0.0.7"} | this_machine
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit, match=r"^credentials: expected an empty folder"):
        credentials._main()
