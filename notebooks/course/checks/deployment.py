"""Notebook 12: certificates, keys and time-outs."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from course.verdict import Answer, check, expect, on_error
from fedlib.credentials import Credentials, make_credentials, new_key, sign


@check
def long_enough(answer: Answer) -> None:
    """The shortest time-out, in whole seconds, for a share of the answers."""
    for share, took, wanted in (
        (0.95, [*(2 * n + 0.5 for n in range(19)), 100.5], 37),
        (0.5, [2.0, 9.0, 1.25, 3.25], 2),
        (0.6, [2.0, 9.0, 1.25, 3.25], 4),
    ):
        trace = [
            {"message_type": "query", "sent": s, "began": s + 0.25 * wait, "ended": s + wait}
            for s, wait in ((100.0 + 7 * n, seconds) for n, seconds in enumerate(took))
        ]
        last = math.ceil(share * len(took)) - 1
        right, unsorted = sorted(took)[last], took[last]
        more = sorted(took)[min(last + 1, len(took) - 1)]
        slips = {
            "Is a node's answer there when its handler begins?": _up(0.25 * right),
            "Where does the clock start?": _up(0.75 * right),
            "Must a time-out be a whole number here?": right,
            "Are so many seconds enough, or is it rounded off?": math.floor(right),
            "Are the messages in the order of what they took?": _up(unsorted),
            "Does it count one answer too many?": _up(more),
            "Does it count one answer too few?": _up(sorted(took)[last - 1]),
            "How many answers may be late?": _up(max(took)),
            "Is a whole number rounded up, too?": math.floor(right) + 1,
        }
        question = f"{share:.0%} of {len(took)} answers that took {sorted(took)[:3]} ... s"
        hint = "Sorted by what they took, which answer must still come?"
        expect(question, answer(trace, share), wanted, hint, slips)


_up = math.ceil


@check
def good_for_host(answer: Answer) -> None:
    """Does a certificate convince a client that calls this host?"""
    ours, server = new_key(), new_key()
    ca, fake = (sign(key, "our CA", key, "our CA") for key in (ours, new_key()))
    certificate = sign(ours, "our CA", server, "www.example.org", ["fl.example.org", "192.0.2.7"])
    stranger = sign(key := new_key(), "their CA", key, "their CA")
    now = datetime.now(UTC)
    for question, authority, host, when, wanted, hint in (
        ("a name that it lists", ca, "fl.example.org", now, True, "Where does it list hosts?"),
        ("an address that it lists", ca, "192.0.2.7", now, True, "Names only?"),
        (
            "a host that it does not list",
            ca,
            "fl2.example.org",
            now,
            False,
            "What does the host change?",
        ),
        ("a part of a name that it lists", ca, "example.org", now, False, "Is that a host of it?"),
        ("its subject's name", ca, "www.example.org", now, False, "Where do hosts stand?"),
        ("another CA of the same name", fake, "fl.example.org", now, False, "Who signed it?"),
        ("another CA", stranger, "fl.example.org", now, False, "Who signed it?"),
        ("in 400 days", ca, "fl.example.org", now + timedelta(400), False, "Until when?"),
        ("400 days ago", ca, "fl.example.org", now - timedelta(400), False, "From when on?"),
    ):
        naive = "Its date knows no time zone. Has it a sister whose name ends in _utc?"
        with on_error((InvalidSignature, ValueError), f"That was {question}. True or False?"):
            try:
                got = answer(certificate, authority, host, when)
            except TypeError as error:
                with on_error(TypeError, naive if "offset-naive" in str(error) else ""):
                    raise
        expect(question, got, wanted, hint)


@check
def three_nodes(answer: Answer) -> None:
    """A node that gets in, and two that must not: their commands, and the files these name."""
    for host, port, shares in (
        ("127.0.0.1:8000", 9096, "partition-id=2 num-partitions=3"),
        ("fl.example.org:9999", 9097, "partition-id=0 num-partitions=5"),
    ):
        with TemporaryDirectory() as name:
            made = make_credentials(Path(name, "superlink"), 0, [host.partition(":")[0]])
            (keys := Path(name, "keys")).mkdir()
            got = answer(keys, made.ca, host, port, shares)
            if got is None or got is ...:
                raise NotImplementedError
            kind = "four lists" if isinstance(got, list | tuple) else type(got).__name__
            expect("what it returns", kind, "four lists", "In the order of the text?")
            expect("how many commands it returns", len(got), 4, "register and three SuperNodes?")
            wanted = {"--superlink": host, "--port": str(port), "--node-config": shares}
            _look(dict(zip(NAMES, got, strict=True)), wanted, made)


NAMES = ("register", "node", "unknown", "mistrustful")
KEY, TRUST = "--auth-supernode-private-key", "--root-certificates"


def _look(commands: Mapping[str, Sequence[Any]], wanted: dict[str, str], made: Credentials) -> None:
    """Say what is wrong with the four commands, if anything is."""
    for name, command in commands.items():
        kind = "a list" if isinstance(command, list | tuple) else type(command).__name__
        expect(f"{name}: what it is", kind, "a list", "What does subprocess take?")
        for word in command:
            text = isinstance(word, str | os.PathLike)
            expect(f"{name}: is {word!r} a text", text, True, "What does subprocess take?")
    flwr = list(map(str, commands["register"]))
    words = [*flwr[:3], *flwr[4:]]
    expect("register, without the key's file", words, [*REGISTER, "deployment"], "In this order?")
    public = _public("register", flwr[3], "a public key", "Which half may leave the node?")

    flags = {name: _flags(name, commands[name]) for name in NAMES[1:]}
    for name, given in flags.items():
        hint = "One argument, without quotes of its own? As it was given?"
        expect(name, {flag: given.get(flag) for flag in wanted}, wanted, hint)
        expect(f"{name}: --insecure is in it", "--insecure" in given, False, "What is the CA for?")
        missing = [flag for flag in (TRUST, KEY) if flag not in given]
        expect(f"{name}: flags that are missing", missing, [])
    for name, flag in (("unknown", KEY), ("mistrustful", TRUST)):
        both = flags["node"].keys() | flags[name].keys()
        differ = sorted(f for f in both if flags[name].get(f) != flags["node"].get(f))
        hint = "Which one thing must be wrong, and is the rest as it is for the node?"
        expect(f"where {name} differs from node", differ, [flag], hint)

    certificate = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    for name, given in flags.items():
        key, trusted = given[KEY], given[TRUST]
        own = _public(name, key, "a private key", "Which half does a node sign with?")
        known = "registered" if own == public else "not registered"
        right = "not registered" if name == "unknown" else "registered"
        expect(f"{name}: its key is", known, right, "Which key does register name?")
        if os.name == "posix":
            mode = f"{Path(key).stat().st_mode & 0o777:o}"
            expect(f"{name}: the mode of its key's file", mode, "600", "Who may read it?")
        signed = _signed(certificate, trusted)
        right = "another authority" if name == "mistrustful" else "the SuperLink's authority"
        expect(f"{name}: whom it trusts", signed, right, "Whose certificate is in that file?")


REGISTER = ["flwr", "supernode", "register"]


def _flags(name: str, command: Sequence[Any]) -> dict[str, str]:
    """Return the flags of a SuperNode's command with their values; --flag=value is --flag value."""
    first = str(command[0]) if command else "nothing"
    expect(f"{name}: the first word", first, "flower-supernode")
    words = [w for a in map(str, command[1:]) for w in (a.split("=", 1) if a[:2] == "--" else [a])]
    flags, last = dict[str, str](), ""
    for word in words:
        if word.startswith("--"):
            flags[last := word] = ""
        else:
            expect(f"{name}: before {word!r} is", last or "no flag", last or "a flag")
            flags[last], last = word, ""
    return flags


def _public(name: str, path: str, wanted: str, hint: str) -> bytes:
    """Return the public half of a key in a file, which is as wanted a public or a private one."""
    question, kind, public = f"{name}: the file {Path(path).name} has", "no key", b""
    if not Path(path).is_file():
        kind = "nothing, it is not there"
    form = Encoding.OpenSSH, PublicFormat.OpenSSH
    with suppress(OSError, ValueError, UnsupportedAlgorithm):
        public = load_ssh_public_key(Path(path).read_bytes()).public_bytes(*form)
        kind = "a public key"
    for load in (load_ssh_private_key, load_pem_private_key):
        with suppress(OSError, ValueError, UnsupportedAlgorithm):
            private = load(Path(path).read_bytes(), password=None)
            public, kind = private.public_key().public_bytes(*form), "a private key"
    expect(question, kind, wanted, hint)
    curve = public.split()[0].decode()
    expect(f"{name}: the kind of its key", curve, "ecdsa-sha2-nistp384", "Which curve is meant?")
    return public


def _signed(certificate: x509.Certificate, path: str) -> str:
    """Say whether the authority whose certificate is in a file has signed this one."""
    try:
        authority = x509.load_pem_x509_certificate(Path(path).read_bytes())
        with suppress(x509.ExtensionNotFound):
            if not authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                return "a certificate that may not sign others"
        certificate.verify_directly_issued_by(authority)
    except OSError:
        return "a file that is not there"
    except InvalidSignature:
        return "another authority"
    except ValueError as error:
        return "another authority" if "issuer" in str(error).lower() else "no certificate"
    return "the SuperLink's authority"
