"""Notebook 11: the app and its commands."""

import itertools
import shlex

from course.verdict import Answer, check, expect, on_error


@check
def run_config_text(answer: Answer) -> None:
    """What --run-config hands over, as a dictionary."""
    run = {"output-dir": "my runs", "seed": 7}
    broken = "Where is a space part of a value, and are its quotes left?"
    values, end = "Is each value read as TOML?", "Where does a pair begin and end?"
    for text, wanted, error, hint in (
        ("momentum=0.5", {"momentum": 0.5}, values, values),
        ("seed=7 use-wandb=false", {"seed": 7, "use-wandb": False}, "One pair a line?", values),
        ("output-dir='my runs' seed=7", run, broken, end),
        ('output-dir="my runs"   seed=7', run, broken, end),
        ("output-dir='my a=b runs' seed=7", run | {"output-dir": "my a=b runs"}, broken, end),
    ):
        with on_error(ValueError, f"That was {text}. {error}"):
            got = answer(text)
        expect(text, got, wanted, hint)


@check
def results_folder(answer: Answer) -> None:
    """Where a run's results land."""
    hint = "Whose folder does a run inherit?"
    expect("/a, /b, runs", answer("/a", "/b", "runs"), "/a/runs", hint)
    expect("/a/d, /b, c/runs", answer("/a/d", "/b", "c/runs"), "/a/d/c/runs", hint)
    expect("/a, /b, /c/runs", answer("/a", "/b", "/c/runs"), "/c/runs", "And if it is absolute?")


@check
def command_line(answer: Answer) -> None:
    """A whole command, taken apart as a shell does."""
    line = answer()
    words = [line] if line in (None, ...) else shlex.split(line)
    expect("the first words", words[0] if len(words) < 3 else words[:3], ["flwr", "run", "fedlib"])
    pairs = (word.split("=", 1) if word.startswith("--") else [word] for word in words)
    words = ["--run-config" if word == "-c" else word for pair in pairs for word in pair]
    behind, hint = dict(itertools.pairwise(words)), "All of its pairs, and as one word?"
    for option, wanted in (
        ("--federation-config", ["client-resources-num-cpus=1", "num-supernodes=20"]),
        ("--run-config", ["num-server-rounds=3", "seed=7"]),
    ):
        came = sorted(behind.get(option, "").split())
        expect(f"the word behind {option}", came, wanted, hint)
    expect("--stream is in it", "--stream" in words, True, "Does it follow the log?")
