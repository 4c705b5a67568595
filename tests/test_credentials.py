"""The credentials: OpenSSL and ssh-keygen, where they are there, read what Python wrote."""

import os
import shutil
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlib.credentials import Credentials, _main, make_credentials, write_node_key
from fedlib.errors import FedlibError


@pytest.fixture
def made(tmp_path: Path) -> Credentials:
    return make_credentials(tmp_path / "new" / "credentials", 2, ["superlink", "127.0.0.1"])


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_authority_signed_the_certificate_and_itself(made: Credentials) -> None:
    ca, server = certificate(made.ca), certificate(made.certificate)
    server.verify_directly_issued_by(ca)
    ca.verify_directly_issued_by(ca)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.not_valid_before_utc < datetime.now(UTC) < server.not_valid_after_utc


def test_the_certificate_is_for_these_hosts_and_this_key(made: Credentials) -> None:
    names = certificate(made.certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["superlink"]
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)  # raises if the key is another's


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to ask")
def test_openssl_agrees(made: Credentials) -> None:
    command = ["openssl", "verify", "-x509_strict", "-verify_hostname", "superlink"]
    command += ["-CAfile", str(made.ca), str(made.certificate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_nodes_key_pair_belongs_together_and_each_node_has_its_own(made: Credentials) -> None:
    points = set()
    for path in made.node_keys:
        private = load_ssh_private_key(path.read_bytes(), None)
        public = load_ssh_public_key(path.with_name(path.name + ".pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key().public_numbers() == public.public_numbers()
        points.add(public.public_numbers().x)
    assert len(points) == 2


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


def test_the_authoritys_own_key_is_nowhere(made: Credentials) -> None:
    authority = certificate(made.ca).public_key()
    private = [path for path in made.folder.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(private) == sorted([made.key, *made.node_keys])
    keys = [load_ssh_private_key(path.read_bytes(), None) for path in made.node_keys]
    keys.append(load_pem_private_key(made.key.read_bytes(), None))
    assert authority not in [key.public_key() for key in keys]


def test_nothing_is_overwritten(made: Credentials) -> None:
    before = made.key.read_bytes()
    with pytest.raises(FedlibError, match=r"expected an empty folder, got .* choose another"):
        make_credentials(made.folder, 2)
    with pytest.raises(FileExistsError):
        write_node_key(made.node_keys[0])
    assert made.key.read_bytes() == before


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(FedlibError, match="credentials: expected a folder to write to, got: "):
        make_credentials(tmp_path / "file" / "credentials", 1)


def test_the_program_makes_them_for_this_machine_and_other_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "credentials"
    _main([str(folder), "--nodes", "3", "--host", "superlink", "--host", "10.0.0.7"])
    assert "3 node keys" in capsys.readouterr().out
    names = certificate(folder / "server.pem").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["superlink", "localhost"]
    assert "10.0.0.7" in map(str, names.value.get_values_for_type(x509.IPAddress))
    with pytest.raises(SystemExit, match="expected an empty folder"):
        _main([str(folder)])


def test_the_program_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = [sys.executable, "-m", "fedlib.credentials", str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "expected an empty folder" in done.stderr
