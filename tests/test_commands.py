"""Every command that a reader may type is taken by the installed command line's own parser."""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import nbformat
import pytest
import typer
import yaml

# Flower's parsers have no public names. Asking for --help instead would not find a flag that is
# gone: argparse prints its help before it looks at the others.
from flwr.cli.app import app as flwr_app
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "fedlib/*.md", "notebooks/*.md")
    for page in REPOSITORY.glob(pattern)
]
NOTEBOOKS = sorted(REPOSITORY.glob("notebooks/*.ipynb"))
COMMANDS = ("flwr", "flower-superlink", "flower-supernode")
START = re.compile(rf"(\S*/)?({'|'.join(COMMANDS)}) (?!\w+: )")
FENCE = re.compile(r"```(?:bash|console|sh|shell)\n(.*?)```", re.DOTALL)
PLACEHOLDER = "1"
"""What stands where the text has a value of its own: a run id, a port, part of a path."""


def from_markdown(text: str) -> Iterator[str]:
    """Lines of code blocks, and code spans, that start with a command."""
    for block in FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            parts = (re.sub(r"^(\$ )?([A-Z_]+=\S+ +)*", "", p.strip()) for p in line.split("&&"))
            yield from (part for part in parts if START.match(part))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        yield from from_python(block)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))
    yield from (span for span in spans if START.match(span) and "…" not in span)


def from_python(source: str) -> Iterator[str]:
    """Texts that start with a command, and calls of a method ``flwr``."""
    nodes = list(ast.walk(ast.parse(source)))
    pieces = {id(v) for node in nodes if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in nodes:
        if id(node) in pieces:
            continue
        if isinstance(node, ast.Constant | ast.JoinedStr) and START.match(text(node) or ""):
            yield str(text(node))
        elif isinstance(node, ast.List | ast.Tuple | ast.Call):
            yield from from_words(node)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "flwr":
            given = [text(argument) for argument in node.args]
            if given and None not in given:
                yield shlex.join(["flwr", *map(str, given)])


def from_words(node: ast.List | ast.Tuple | ast.Call) -> Iterator[str]:
    """A command whose words stand side by side, as subprocess takes them."""
    words = [text(word) for word in flat(node.args if isinstance(node, ast.Call) else node.elts)]
    for start, word in enumerate(words):
        if word in COMMANDS and len(words) > start + 1 and words[start + 1] != "flwr-datasets":
            yield shlex.join(w or PLACEHOLDER for w in words[start:])


def flat(words: list[ast.expr]) -> Iterator[ast.expr]:
    for word in words:
        inner = word.value if isinstance(word, ast.Starred) else word
        if isinstance(inner, ast.Tuple | ast.List):
            yield from flat(inner.elts)
        else:
            yield inner


def text(node: ast.AST) -> str | None:
    """A literal text, with a placeholder for each value in it; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else PLACEHOLDER for v in node.values]
        return "".join(parts)
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call):
        return PLACEHOLDER
    return None


@cache
def found() -> dict[str, list[str]]:
    """All commands by where they stand."""
    commands = {
        str(path.relative_to(REPOSITORY)): list(from_markdown(path.read_text("utf-8")))
        for path in PAGES
    }
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        code = [c.source for c in cells if c.cell_type == "code"]
        prose = [c.source for c in cells if c.cell_type == "markdown"]
        commands[path.name] = [
            *itertools.chain.from_iterable(map(from_markdown, prose)),
            *itertools.chain.from_iterable(map(from_python, code)),
        ]
    make_run = REPOSITORY / "tools" / "run.py"
    commands[make_run.name] = list(from_python(make_run.read_text("utf-8")))
    compose = (REPOSITORY / "compose.yaml").read_text("utf-8")
    services = yaml.safe_load(compose)["services"].values()
    commands["compose.yaml"] = [
        *re.findall(r"^#   (flwr [^(\n]*)", compose, re.MULTILINE),
        *(shlex.join(service["command"]) for service in services),
    ]
    return commands


def parse(command: str) -> dict[str, Any]:
    """Parse a command line as its program would, and return what it understood.

    Raises:
        SystemExit, AssertionError, click.UsageError: The program would refuse it.
    """
    words = shlex.split(command, comments=True)
    # RUN_ID and the like stand for a value.
    program, *arguments = [PLACEHOLDER if re.fullmatch("[A-Z][A-Z_]+", w) else w for w in words]
    program = Path(program).name
    if program == "flwr":
        return parse_flwr(arguments)
    parser = {
        "flower-superlink": _parse_args_run_superlink,
        "flower-supernode": _parse_args_run_supernode,
    }[program]()
    parser.allow_abbrev = False
    known, unknown = parser.parse_known_args(arguments)
    assert set(unknown) <= {PLACEHOLDER}, f"unknown: {unknown}"  # which stands for more options
    return vars(known)


def parse_flwr(arguments: list[str]) -> dict[str, Any]:
    """Go down to the sub-command that is meant and let it parse the rest; it does not run."""
    command: Any = typer.main.get_command(flwr_app)
    if arguments[0] in {option for parameter in command.params for option in parameter.opts}:
        return {}  # flwr --version
    while arguments and hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{name}: not one of {', '.join(command.commands)}"
        command = command.commands[name]
    context = command.make_context(command.name, list(arguments))
    assert not context.args, f"left over: {context.args}"
    return dict(context.params)


def cases() -> list[Any]:
    return [
        pytest.param(command, id=f"{name}-{number}")
        for name, commands in found().items()
        for number, command in enumerate(dict.fromkeys(commands))
    ]


@pytest.mark.parametrize("command", cases())
def test_the_installed_parser_takes_it(command: str) -> None:
    try:
        parse(command)
    except click.MissingParameter:  # a sentence that only names a command
        assert re.fullmatch(r"flwr( [a-z]+)+", command)


def test_there_are_some_in_each_place_where_a_reader_looks() -> None:
    for name in ("docs/running.md", "docs/deploying.md", "fedlib/README.md", "compose.yaml"):
        assert len(found()[name]) >= 2, name
    for name in ("11-from-notebook-to-app.ipynb", "12-deployment.ipynb"):
        assert len(found()[name]) >= 2, name
    assert found()["run.py"]
