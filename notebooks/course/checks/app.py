"""Notebook 11: the app and its commands."""

import ast
import importlib
import io
import itertools
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from course.draw import is_reply
from course.verdict import Answer, check, expect, on_error, watch
from course.virtual import VirtualGrid
from fedlib.errors import one_line

TABLES = {  # of pyproject.toml, with the keys that must be there
    "project": ("name", "version", "dependencies"),
    "tool.flwr.app": ("publisher",),
    "tool.flwr.app.components": ("serverapp", "clientapp"),
    "tool.flwr.app.config": ("warm-above", "min-nodes"),
}
LIMIT_S = 40  # on the virtual clock: a wait of 30 s, and something for looking
MANY_LOOKS = 10_000  # for replies: more than one in 5 ms while it waits 30 s


@check
def own_app(answer: Answer) -> None:
    """An app that asks every node whether it is warm: read as Flower does, then run with faults."""
    files = answer()
    expect("what it returns", files, {} if not isinstance(files, Mapping) else files)
    expect("its files", sorted(map(str, files)), sorted({*map(str, files), "pyproject.toml"}))
    kinds = {name: type(text).__name__ for name, text in files.items()}
    expect("what a file's name stands for", kinds, dict.fromkeys(files, "str"), "Its text?")
    open_lines = [name for name, text in files.items() if "..." in map(str.strip, text.split("\n"))]
    if len(open_lines) == len(files):
        raise NotImplementedError
    components = _declared(files)
    expect("files that still have a line of three dots", open_lines, [])
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        for case in CASES:
            case.run(Path(folder), components)


def _declared(files: Mapping[str, str]) -> dict[str, str]:
    """Look at pyproject.toml, and return where the two apps are."""
    with on_error(tomllib.TOMLDecodeError, "It is about pyproject.toml. Are its texts quoted?"):
        project = tomllib.loads(files["pyproject.toml"])
    found = dict[str, Any]()
    for table, keys in TABLES.items():
        found = project
        for part in table.split("."):
            found = found.get(part, {})
        there = ", ".join(key for key in keys if found.get(key, "") != "") or "none"
        hint = "Is the table's name right?" if not found else "What must it say?"
        if any(key.replace("-", "_") in found for key in keys if "-" in key):
            hint = "Which words have a hyphen, which an underscore?"
        expect(f"the keys in [{table}]", there, ", ".join(keys), hint)
    expect("the config", {key: found[key] for key in keys}, CASES[0].config, "Which defaults?")
    named = {re.split(r"[^\w.-]", text)[0].lower() for text in project["project"]["dependencies"]}
    for name, text in files.items():
        if name.endswith(".py"):
            for package in _imported(text, files) | {"flwr"}:
                hint = "What must a machine install that has only Python?"
                there = package if package.lower() in named else "not in dependencies"
                expect(f"{name} needs {package}", there, package, hint)
    return dict(project["tool"]["flwr"]["app"]["components"])


def _imported(text: str, files: Mapping[str, str]) -> set[str]:
    """Return the packages that a module imports, besides Python's own and the app's modules."""
    with suppress(SyntaxError):  # of which we speak later
        parts = list(ast.walk(ast.parse(text)))
        names = {a.name for part in parts if isinstance(part, ast.Import) for a in part.names}
        names |= {p.module for p in parts if isinstance(p, ast.ImportFrom) and p.module}
        tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"flwr"}
        tops -= {re.split(r"[/.]", name)[0] for name in files}
        owners = packages_distributions() if tops else {}
        return {owners.get(top, [top])[0] for top in tops}
    return set()


@dataclass(frozen=True)
class _Case:
    """What goes on while the app runs, and what it must print."""

    question: str
    wanted: str
    slips: Mapping[str, str]  # what else it may print, and the question that helps
    config: Mapping[str, float] = field(
        default_factory=lambda: {"warm-above": 23.5, "min-nodes": 10}
    )
    raising: int = -1  # the node whose handler raises
    silent: int = -1  # the node that never answers
    slow: int = -1  # the node that answers after SLOW_S
    more: int = 0  # how many nodes there are beyond min-nodes
    coming: tuple[int, ...] = ()  # how many nodes there are at the first looks

    def run(self, folder: Path, components: Mapping[str, str]) -> None:
        """Load the app anew, and let it run on a virtual clock."""

        def client_app(message: Message, context: Context) -> Any:
            if context.node_config["partition-id"] == self.raising:
                raise ValueError("my sensor is broken")
            with redirect_stdout(io.StringIO()):  # what counts is the line of the ServerApp
                return apps["clientapp"](message, context)

        apps, printed = dict[str, Any](), io.StringIO()
        num_nodes, config = int(self.config["min-nodes"]) + self.more, UserConfig(self.config)
        late = {self.silent: math.inf, self.slow: SLOW_S}
        grid = _Coming(client_app, num_nodes, config, late, self.coming)
        context = Context(1, 1, {}, RecordDict(), config)
        with grid, _loading(folder):  # so that the app's modules import this clock
            for side, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
                apps[side] = _load(side, components[side], kind, folder)
            try:
                with redirect_stdout(printed):
                    apps["serverapp"](watch(grid), context)
            except Exception as error:
                hint = (
                    "What does a reply with an error have, and what not?"
                    if self.raising > 0
                    else ""
                )
                if isinstance(error, TimeoutError):
                    hint = "What ends its waiting?"
                with on_error(Exception, f"That was the ServerApp; {self.question}. {hint}"):
                    raise
        came = re.findall(r"\d+ of \d+", printed.getvalue())
        if self.wanted not in came:
            got = came[-1] if came else one_line(printed.getvalue())[-60:] or "nothing"
            hint = self.slips.get(got, "") if came else "Does the ServerApp print its line?"
            for _, message, _ in grid.history:
                reason = message.error.reason or "" if message.has_error() else ""
                if reason and "my sensor" not in reason:
                    hint = f"A node said: {one_line(reason)[-150:]}."
            expect(f"what it prints; {self.question}", got, self.wanted, hint)
        lines = [line for line in printed.getvalue().splitlines() if line.strip()]
        hint = "What does it print beside its result?"
        expect(f"how many lines it prints; {self.question}", len(lines), 1, hint)
        hint = "How long may send_and_receive wait?"
        seconds = "40 s or less" if grid.seconds <= LIMIT_S else f"{grid.seconds:,.0f} s"
        expect(f"how long it waits; {self.question}", seconds, "40 s or less", hint)
        busy = self.coming and len(set(grid.looked_at)) == 1
        rests = "no rest" if busy or grid.num_pulls > MANY_LOOKS else "a rest"
        hint = "What does a loop cost that only looks?"
        expect("between two looks", rests, "a rest", hint)
        answers = set[str]()
        for _, message, _ in grid.history:
            if not is_reply(message):
                ttl = "40 s or less" if message.metadata.ttl <= LIMIT_S else "longer"
                hint = "Which second clock has a message (05)?"
                expect("a message's time-to-live", ttl, "40 s or less", hint)
            elif message.has_content():
                secret = 18 + message.metadata.src_node_id  # node i + 2 holds partition i
                values = [v for record in message.content.values() for v in record.values()]
                told = "its temperature" if secret in values else "yes or no"
                expect("what a node tells the server", told, "yes or no", "Who compares?")
                reply = {name: dict(record) for name, record in message.content.items()}
                answers.add(repr(reply))
        told = "yes or no" if len(answers) <= 2 else f"{len(answers)} different answers"
        hint = "What is in a reply beside the yes or no?"
        expect("what the nodes tell the server", told, "yes or no", hint)


SLOW_S = 5.0
_LIMIT = "From where comes the limit that it compares with?"
_EARLY = "Who was there when it asked? In a simulation, too, the ServerApp is there first."
_COUNT = "Who is counted behind 'of'?"
CASES = (
    _Case("10 nodes, warm-above=23.5", "6 of 10", {"4 of 10": "Who is warm?"}),
    _Case(
        "10 nodes, warm-above=27.5",
        "2 of 10",
        {"6 of 10": _LIMIT},
        {"warm-above": 27.5, "min-nodes": 10},
    ),
    _Case(
        "10 nodes, warm-above=24.0",
        "5 of 10",
        {"6 of 10": "One node has 24 degrees. Is it warmer than that?"},
        {"warm-above": 24.0, "min-nodes": 10},
    ),
    _Case(
        "6 nodes that come one by one, min-nodes=6",
        "2 of 6",
        {f"0 of {n}": _EARLY for n in range(6)},
        {"warm-above": 23.5, "min-nodes": 6},
        coming=(0, 0, 0, 0, 1, 1, 2, 2, 4),
    ),
    _Case(
        "12 nodes, min-nodes=10",
        "8 of 12",
        {"6 of 10": "How many nodes are there, and how many does it ask?"},
        more=2,
    ),
    _Case(
        f"one of 10 nodes answers after {SLOW_S:g} s",
        "6 of 10",
        {"5 of 9": "How long may it wait, and how long is a message valid?"},
        slow=9,
    ),
    _Case("one of 10 nodes raises an error", "5 of 9", {"5 of 10": _COUNT}, raising=9),
    _Case("one of 10 nodes never answers", "5 of 9", {"5 of 10": _COUNT}, silent=8),
)


class _Coming(VirtualGrid):
    """Nodes that are not there yet when the ServerApp begins; one of them may be late or silent."""

    def __init__(
        self,
        client_app: Any,
        num_nodes: int,
        config: UserConfig,
        late: Mapping[int, float],
        coming: Sequence[int],
    ) -> None:
        super().__init__(client_app, num_nodes, config, work_s=self._work)
        self._late, self._looks = late, iter(coming)
        self.looked_at, self.num_pulls = list[float](), 0

    def _work(self, message: Message) -> float:
        return self._late.get(message.metadata.dst_node_id - 2, 0.0)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Count the looks for replies."""
        self.num_pulls += 1
        return super().pull_messages(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Return those that are there by now; who looks and never rests is stopped."""
        self.looked_at.append(self.seconds)
        if self.looked_at[-MANY_LOOKS:] == [self.seconds] * MANY_LOOKS:
            raise TimeoutError(f"it still looks after {MANY_LOOKS:,} looks without a rest")
        return list(self.contexts)[: next(self._looks, len(self.contexts))]


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Let the app's modules be found, and forget them afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]

    own = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    hidden = {k: v for k, v in sys.modules.items() if k.partition(".")[0] in own}
    forget()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()
        sys.modules.update(hidden)


def _load(side: str, reference: str, kind: type, folder: Path) -> Any:
    """Return the app that a component names, as Flower finds it."""
    question, (module, colon, name) = f"{side} = {reference!r}", str(reference).partition(":")
    expect(question, "module:name" if colon and name else "no colon", "module:name")
    path = module.replace(".", "/")
    there = [p.name for p in (folder / f"{path}.py", folder / path / "__init__.py") if p.is_file()]
    hint = "Is a module's name that of its file, without .py?"
    got = "there" if there else "not there"
    expect(f"{question}, so the app's file {path}.py", got, "there", hint)
    try:
        app = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        hint = "Where do its lines begin?" if isinstance(error, IndentationError) else ""
        with on_error(Exception, f"That was the import of {module}. {hint}"):
            raise
    hint = f"What is called {name} in {module}?"
    expect(question, type(app).__name__, kind.__name__, hint)
    if kind is ServerApp:
        text = (folder / path).with_suffix(".py").read_text(encoding="utf-8") if there else ""
        main = "@app.main()" if re.search(r"\.main\(\)", text) else "no function"
        expect(f"{module}, under @app.main()", main, "@app.main()", "What does Flower call?")
    return app


@check
def results_folder(answer: Answer) -> None:
    """Where a run's results land."""
    hint = "Whose folder does a run inherit?"
    expect("/a, /b, runs", answer("/a", "/b", "runs"), "/a/runs", hint)
    expect("/a/d, /b, c/runs", answer("/a/d", "/b", "c/runs"), "/a/d/c/runs", hint)
    expect("/a, /b, /c/runs", answer("/a", "/b", "/c/runs"), "/c/runs", "And if it is absolute?")


@check
def command_line(answer: Answer) -> None:
    """A whole command, taken apart as a shell does, and its pairs as Flower does."""
    line = answer()
    if line is None or line is ...:
        raise NotImplementedError
    expect("what it returns", line, "" if not isinstance(line, str) else line)
    with on_error(ValueError, "Has every quote its partner?"):
        words = shlex.split(line)
    first = [*words[:2], *(word.removeprefix("./").rstrip("/") for word in words[2:3])]
    hint = "Which program, which command of it, and which folder?"
    expect("the first words", first, ["flwr", "run", "fedlib"], hint)
    pairs = (word.split("=", 1) if word.startswith("--") else [word] for word in words)
    words = ["--run-config" if word == "-c" else word for pair in pairs for word in pair]
    behind = dict(itertools.pairwise(words))
    for option, wanted in PAIRS.items():
        expect(f"how often {option} is there", words.count(option), 1, "One word, several pairs?")
        expect(f"the word behind {option}", *_pairs(behind.get(option, ""), wanted))
    expect("--stream is in it", "--stream" in words, True, "Does it follow the log?")


PAIRS = {
    "--federation-config": {"client-resources-num-cpus": 1, "num-supernodes": 20},
    "--run-config": {"num-server-rounds": 3, "seed": 7},
}


def _pairs(word: str, wanted: Mapping[str, int]) -> tuple[str, str, str]:
    """Return what Flower reads in a word, what it should read, and a question that helps."""
    right = " ".join(f"{key}={value}" for key, value in wanted.items())
    found = dict(re.findall(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)", word))
    if found.get("client-resources-num-cpus") == "1.0":  # the only one that may be a fraction
        found["client-resources-num-cpus"] = "1"
    if found == {key: str(value) for key, value in wanted.items()}:
        return right, right, ""
    other = {key for pairs in PAIRS.values() for key in pairs} - wanted.keys()
    hint = "All of its pairs, with the values asked for, and as one word?"
    if re.search(r"\s=|=\s|=$", word):
        hint = "What does Flower make of a pair with a space beside its '='?"
    elif "," in word:
        hint = "What stands between two pairs?"
    elif word[:1] in ("'", '"'):
        hint = "The shell takes off one pair of quotes. Whose are these?"
    elif any(value[0] in "'\"" for value in found.values()):
        hint = "The quotes are a part of this value. Is it a number then, or a text?"
    elif found.keys() & other:
        hint = "Which of the numbers is for the engine, which for the app?"
    elif found.keys() - wanted.keys():
        hint = "What are the keys called, with hyphens?"
    return word, right, hint
