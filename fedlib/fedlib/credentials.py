"""Who may talk to whom: a certificate authority, the SuperLink's certificate, the nodes' keys.

TLS answers "is this the SuperLink?": it shows a certificate for its host name, signed by an
authority (CA) that the nodes trust. A node's key answers "is this one of our nodes?": it signs
each request, and the SuperLink knows the public half. As a program:
``python -m fedlib.credentials FOLDER --nodes 3 --host superlink``.
"""

import argparse
import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import idna
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlib.errors import FedlibError

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"  # of a host's name, between its dots
HOST = re.compile(rf"(?=.{{1,253}}$)(\*\.{LABEL}\.)?({LABEL}\.)*(?!\d+$){LABEL}")  # not 256.1.1.1
VALID_DAYS = 365
PRIVATE, PUBLIC = 0o600, 0o644


@dataclass(frozen=True)
class Credentials:
    """Where the files lie."""

    folder: Path  # what holds them all; only its owner may enter
    ca: Path  # the authority's certificate (PEM), which every node and every user needs
    certificate: Path  # the SuperLink's (PEM)
    key: Path  # its private key (PEM), mode 0600
    node_keys: tuple[Path, ...]  # OpenSSH, mode 0600; the public half beside each, as NAME.pub


def make_credentials(
    folder: Path, num_nodes: int, hosts: Sequence[str] = THIS_MACHINE
) -> Credentials:
    """Make everything that a federation with TLS and authenticated nodes needs.

    The authority's private key is never written: once this function returns, nobody can sign
    another certificate with it. To add a host (a name or an IP address under which the SuperLink
    is reached), make a new set. The folder is empty or new, and outside any repository.

    Raises:
        FedlibError: The folder holds something or cannot be written, a host is neither a name nor
            an address, or there are no hosts or fewer than no nodes.
    """
    if num_nodes < 0 or not hosts:
        raise FedlibError(
            f"credentials: expected one or more hosts and 0 or more nodes, got {len(hosts)} hosts "
            f"and {num_nodes} nodes"
        )
    node_keys = tuple(folder / f"node-{n}" for n in range(num_nodes))
    paths = Credentials(
        folder, folder / "ca.crt", folder / "server.pem", folder / "server.key", node_keys
    )
    ca_key, server_key = new_key(), new_key()
    ca = sign(ca_key, "fedlib CA", ca_key, "fedlib CA")
    certificate = sign(ca_key, "fedlib CA", server_key, "SuperLink", hosts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FedlibError(
                f"credentials: expected an empty folder, got {folder} with files in it; "
                f"choose another one, or delete it if no SuperLink uses them any more"
            )
        folder.chmod(0o700)
        _write(paths.ca, ca.public_bytes(Encoding.PEM), PUBLIC)
        _write(paths.certificate, certificate.public_bytes(Encoding.PEM), PUBLIC)
        _write(paths.key, _private_bytes(server_key, PrivateFormat.PKCS8), PRIVATE)
        for path in paths.node_keys:
            write_node_key(path)
    except OSError as error:
        raise FedlibError(f"credentials: expected a folder to write to, got: {error}") from error
    return paths


def write_node_key(path: Path) -> None:
    """Make a key pair for a node: the private half at ``path``, the public one at ``path.pub``."""
    key = new_key()
    _write(path, _private_bytes(key, PrivateFormat.OpenSSH), PRIVATE)
    form = serialization.PublicFormat.OpenSSH
    public = key.public_key().public_bytes(Encoding.OpenSSH, form)
    _write(path.with_name(path.name + ".pub"), public, PUBLIC)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new private key on P-384, the curve that Flower names for SuperNodes."""
    return ec.generate_private_key(ec.SECP384R1())


def sign(
    ca_key: ec.EllipticCurvePrivateKey,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    subject: str,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """Return a certificate that says, with the authority's signature: this key is ``subject``'s.

    Without hosts it is an authority's own, which may sign others; with hosts a server's.

    Source: the extensions that RFC 5280, section 4.2, asks of each; Python 3.13 insists on them.
    """
    now, is_ca = datetime.now(UTC), not hosts
    public, ca_public = key.public_key(), ca_key.public_key()
    builder = (
        x509.CertificateBuilder(_name(issuer), _name(subject), public, x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_public), False)
        .add_extension(
            x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False), True
        )  # a signature of its own; or of certificates and of lists of revoked ones
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(names, False).add_extension(purpose, False)
    return builder.sign(ca_key, hashes.SHA384())


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    no_password = serialization.NoEncryption()  # the file's mode protects it
    return key.private_bytes(Encoding.PEM, form, no_password)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Create a file so that at no time can others read it (on Windows, the folder decides)."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    """Return an address, or a name as clients look for it: ``xn--mnchen-3ya.example``, say."""
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    star = "*." if host.startswith("*.") else ""
    with suppress(UnicodeError):
        name = (
            host if host.isascii() else star + idna.encode(host[len(star) :], uts46=True).decode()
        )
        if HOST.fullmatch(name):
            return x509.DNSName(name)
    raise FedlibError(
        f"credentials: expected a host's name (superlink.example.org) or IP address, without "
        f"https://, port or brackets, got {host!r}"
    )


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedlib.credentials", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder, outside any repository")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes get a key")
    parser.add_argument(
        "--host", action="append", default=[], help="name or address of the SuperLink, repeatable"
    )
    given = parser.parse_args()
    try:
        made = make_credentials(given.folder, given.nodes, [*given.host, *THIS_MACHINE])
    except FedlibError as error:
        sys.exit(str(error))
    print(f"{made.folder}: ca.crt, server.pem, server.key and {given.nodes} node keys")


if __name__ == "__main__":
    _main()
