"""The nodes of notebook 12: right commands that look otherwise, and wrong ones that hear why."""

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course import checks
from course.deployment import three_nodes
from fedlib.credentials import make_credentials, write_node_key

Commands = list[list[Any]]
Change = Callable[[Commands, Path, Path], object]
KEY, TRUST, PORT = "--auth-supernode-private-key", "--root-certificates", "--port"
REGISTER, NODE, UNKNOWN, MISTRUSTFUL = range(4)


def verdict(change: Change, capsys: pytest.CaptureFixture[str]) -> str:
    """What an answer hears that is right, but for a change to its commands or files."""

    def answer(folder: Path, ca: Path, link: str, port: int, shares: str) -> Any:
        commands = [list(command) for command in three_nodes(folder, ca, link, port, shares)]
        change(commands, folder, ca)
        return commands

    checks.three_nodes(answer)
    return capsys.readouterr().out.splitlines()[0]


def put(command: list[Any], flag: str, value: Any) -> None:
    command[command.index(flag) + 1] = value


def put_in_all(flag: str, new: Callable[[Any], Any]) -> Change:
    def change(commands: Commands, *_: Path) -> None:
        for command in commands[NODE:]:
            put(command, flag, new(command[command.index(flag) + 1]))

    return change


def with_equals_signs(commands: Commands, *_: Path) -> None:
    for n in (NODE, UNKNOWN, MISTRUSTFUL):
        words = commands[n]
        commands[n] = [
            words[0],
            *(f"{a}={b}" for a, b in zip(words[1::2], words[2::2], strict=True)),
        ]


def in_another_order(commands: Commands, *_: Path) -> None:
    words = commands[UNKNOWN]
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    commands[UNKNOWN] = [words[0], *(word for pair in reversed(pairs) for word in pair)]


def as_paths(commands: Commands, *_: Path) -> None:
    for command in commands[NODE:]:
        for flag in (KEY, TRUST):
            put(command, flag, Path(command[command.index(flag) + 1]))


def another_authority_with_nodes(commands: Commands, folder: Path, _: Path) -> None:
    put(commands[MISTRUSTFUL], TRUST, make_credentials(folder / "more", 2).ca)


@pytest.mark.parametrize(
    "change",
    [
        with_equals_signs,
        in_another_order,
        as_paths,
        another_authority_with_nodes,
        lambda commands, *_: [c.extend(["--max-retries", "1"]) for c in commands[NODE:]],
    ],
)
def test_right_commands_may_look_otherwise(
    change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(change, capsys).endswith("right.")


def copy_of_the_key(commands: Commands, folder: Path, _: Path) -> None:
    put(commands[UNKNOWN], KEY, str(shutil.copy(folder / "mine", folder / "copy")))


def two_things(commands: Commands, folder: Path, _: Path) -> None:
    put(commands[MISTRUSTFUL], KEY, str(folder / "stranger"))


def server_certificate(commands: Commands, folder: Path, _: Path) -> None:
    put(commands[MISTRUSTFUL], TRUST, make_credentials(folder / "more", 0).certificate)


def readable_by_all(commands: Commands, folder: Path, _: Path) -> None:
    (folder / "mine").chmod(0o644)


def ssh_keygen(commands: Commands, folder: Path, _: Path) -> None:
    file = folder / "small"
    kind = ["-t", "ecdsa", "-b", "256", "-N", "", "-q"]
    subprocess.run(["ssh-keygen", *kind, "-f", str(file)], check=True)
    commands[REGISTER][3] = f"{file}.pub"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, *_: c.pop(), "expected 4, got 3"),
        (lambda c, *_: c.__setitem__(NODE, " ".join(c[NODE])), "What does subprocess take?"),
        (server_certificate, "may not sign others"),
        (put_in_all(PORT, int), "is 9096 a text"),
        (lambda c, *_: c[REGISTER].__setitem__(3, c[REGISTER][3][:-4]), "Which half may leave"),
        (lambda c, *_: c[REGISTER].pop(), "register, without the key's file"),
        (lambda c, f, _: c[REGISTER].__setitem__(3, f"{f}/stranger.pub"), "does register name?"),
        (lambda c, f, _: c[REGISTER].__setitem__(3, f"{f}/none.pub"), "it is not there"),
        (put_in_all("--node-config", lambda text: f"'{text}'"), "without quotes of its own?"),
        (put_in_all("--superlink", lambda text: f"https://{text}"), "node: --superlink"),
        (lambda c, *_: [x.append("--insecure") for x in c[NODE:]], "What is the CA for?"),
        (lambda c, *_: c[UNKNOWN].append("--insecure"), "unknown: --insecure"),
        (lambda c, *_: c[NODE].__setitem__(0, "flower-superlink"), "the first word"),
        (lambda c, *_: c.__setitem__(UNKNOWN, c[NODE]), "where unknown differs from node"),
        (two_things, "where mistrustful differs from node"),
        (copy_of_the_key, "unknown: its key is: expected 'not registered'"),
        (lambda c, f, a: put(c[MISTRUSTFUL], TRUST, shutil.copy(a, f / "ca")), "in that file?"),
        (lambda c, f, _: put(c[MISTRUSTFUL], TRUST, f / "mine"), "got 'no certificate'"),
        (lambda c, f, _: put(c[MISTRUSTFUL], TRUST, f / "none"), "a file that is not there"),
        (put_in_all(KEY, lambda path: f"{path}.pub"), "Which half does a node sign with?"),
        (lambda c, *_: [x.__delitem__(slice(7, 9)) for x in c[NODE:]], "flags that are missing"),
    ],
)
def test_wrong_commands_hear_why(
    change: Change, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(change, capsys)
    assert line.startswith("❌") and words in line


@pytest.mark.skipif(not hasattr(Path, "owner"), reason="modes of POSIX")
def test_a_private_key_that_all_may_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected '600', got '644'" in verdict(readable_by_all, capsys)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_a_key_on_another_curve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Which curve is meant?" in verdict(ssh_keygen, capsys)


def test_hard_coded_values_are_noticed_by_the_second_case(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(folder: Path, ca: Path, link: str, port: int, shares: str) -> Any:
        return three_nodes(folder, ca, link, port, "partition-id=2 num-partitions=3")

    checks.three_nodes(answer)
    assert "node: --node-config" in capsys.readouterr().out


def test_one_registered_key_for_all_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(folder: Path, ca: Path, *given: Any) -> Any:
        register, node, _, mistrustful = three_nodes(folder, ca, *given)
        write_node_key(folder / "third")
        return register, node, node, mistrustful

    checks.three_nodes(answer)
    assert "where unknown differs from node" in capsys.readouterr().out


def test_a_dictionary_of_commands_hears_so(capsys: pytest.CaptureFixture[str]) -> None:
    checks.three_nodes(lambda *given: dict(zip("abcd", three_nodes(*given), strict=True)))
    assert "expected 'four lists', got 'dict'" in capsys.readouterr().out


def took(trace: Any) -> list[float]:
    return sorted(m["ended"] - m["sent"] for m in trace)


def nth(times: list[float], share: float) -> float:
    return times[math.ceil(share * len(times)) - 1]


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda t, p: math.ceil(nth(took(t), p)), "right"),
        (
            lambda t, p: next(n for n in range(200) if sum(x <= n for x in took(t)) >= p * len(t)),
            "ri",
        ),
        (lambda t, p: math.ceil(nth(sorted(m["began"] - m["sent"] for m in t), p)), "begins?"),
        (
            lambda t, p: math.ceil(nth(sorted(m["ended"] - m["began"] for m in t), p)),
            "clock start?",
        ),
        (lambda t, p: nth(took(t), p), "a whole number here?"),
        (lambda t, p: round(nth(took(t), p)), "rounded off?"),
        (lambda t, p: int(nth(took(t), p)) + 1, "rounded up, too?"),
        (lambda t, p: math.ceil(nth([m["ended"] - m["sent"] for m in t], p)), "in the order"),
        (lambda t, p: math.ceil(took(t)[int(p * len(t))]), "too many?"),
    ],
)
def test_a_time_out_hears_which_slip_it_is(
    answer: Callable[[Any, float], float], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checks.long_enough(answer)
    assert words in capsys.readouterr().out


def test_a_date_without_a_time_zone_hears_of_its_sister(
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks.good_for_host(lambda c, ca, host, now: now.replace(tzinfo=None) <= now)
    assert "ends in _utc" in capsys.readouterr().out
    for constant, words in ((True, "What does the host change?"), (False, "list hosts?")):
        checks.good_for_host(lambda *_, constant=constant: constant)
        assert words in capsys.readouterr().out
