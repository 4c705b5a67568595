"""Notebook 12: certificates, keys and time-outs."""

import os
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import InvalidSignature

from course.verdict import Answer, check, expect, on_error
from fedlib.credentials import new_key, sign


@check
def long_enough(answer: Answer) -> None:
    """The shortest time-out, in whole seconds, for a share of the answers."""
    for share, took, wanted in (
        (0.95, [*(n + 0.5 for n in range(19)), 100.5], 19),
        (0.5, [9.0, 2.0, 3.25, 1.25], 2),
        (0.6, [9.0, 2.0, 3.25, 1.25], 4),
    ):
        times = [(100.0 + 7 * n, seconds) for n, seconds in enumerate(took)]
        trace = [
            {"message_type": "query", "sent": s, "began": s + seconds / 2, "ended": s + seconds}
            for s, seconds in times
        ]
        question = f"{share:.0%} of {len(took)} answers that took {sorted(took)[:3]} ... s"
        hint = "From when to when? Sorted, which answer must still come? To whole seconds, upwards?"
        expect(question, answer(trace, share), wanted, hint)


@check
def good_for_host(answer: Answer) -> None:
    """Does a certificate convince a client that calls this host?"""
    ours, server = new_key(), new_key()
    ca, fake = (sign(key, "our CA", key, "our CA") for key in (ours, new_key()))
    certificate = sign(ours, "our CA", server, "www.example.org", ["fl.example.org", "192.0.2.7"])
    stranger = sign(key := new_key(), "their CA", key, "their CA")
    now = datetime.now(UTC)
    for question, authority, host, when, wanted, hint in (
        ("a name that it lists", ca, "fl.example.org", now, True, "Does its subject list hosts?"),
        ("an address that it lists", ca, "192.0.2.7", now, True, "Names only?"),
        ("a host that it does not list", ca, "fl2.example.org", now, False, "Which hosts?"),
        ("its subject's name", ca, "www.example.org", now, False, "Where do hosts stand?"),
        ("another CA of the same name", fake, "fl.example.org", now, False, "Who signed it?"),
        ("another CA", stranger, "fl.example.org", now, False, "Who signed it?"),
        ("in 400 days", ca, "fl.example.org", now + timedelta(400), False, "Until when?"),
        ("400 days ago", ca, "fl.example.org", now - timedelta(400), False, "From when on?"),
    ):
        with on_error((InvalidSignature, ValueError), f"That was {question}. True or False?"):
            got = answer(certificate, authority, host, when)
        expect(question, got, wanted, hint)


@check
def supernode_command(answer: Answer) -> None:
    """The command that starts a SuperNode, as a list of arguments."""
    command = answer(2, 5, "fl.example.org:8000", "ca.crt", "node-2", 9096)
    expect("the first word", command if command in (None, ...) else command[0], "flower-supernode")
    for word in command:
        text, hint = isinstance(word, (str, os.PathLike)), "What does subprocess take?"
        expect(f"is {word!r} a text", text, True, hint)
    pairs = (a.split("=", 1) if a.startswith("--") else [a] for a in map(str, command))
    words = [word for pair in pairs for word in pair]  # --flag=value is --flag value
    expect("--insecure is in it", "--insecure" in words, False, "Then what is the CA for?")
    flags = dict(zip(words[1::2], words[2::2], strict=False))
    shares = dict(pair.partition("=")[::2] for pair in flags.pop("--node-config", "").split())
    wanted = {"partition-id": "2", "num-partitions": "5"}
    expect("the node config", shares, wanted, "One argument, with a space in it?")
    wanted = {"--superlink": "fl.example.org:8000", "--root-certificates": "ca.crt"}
    wanted |= {"--auth-supernode-private-key": "node-2", "--port": "9096"}
    given = {flag: flags.get(flag) for flag in wanted}
    expect("the other flags", given, wanted, "Does each have its value?")
