"""What a check does beside its one line: it hands on a function, and shows messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from course import WatchedGrid, checks
from course.checks.toy import toy_app
from course.verdict import check, expect, on_error, watch


@check
def doubled(answer: Any) -> None:
    """Twice a number."""
    expect("3", answer(3), 6)


def right(x: int) -> int:
    return 2 * x


def wrong(x: int) -> int:
    return x + 2


def stub(x: int) -> Any: ...


def ours(x: int) -> int:
    return x + x


@pytest.mark.parametrize(
    ("answer", "mark", "chosen"),
    [(right, "✅ right", right), (wrong, "❌ wrong", ours), (stub, "⏳ stub", ours)],
)
def test_the_cells_below_use_a_right_answer_and_else_ours(
    answer: Callable[[int], int],
    mark: str,
    chosen: Callable[[int], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doubled(answer, otherwise=ours) is chosen
    lines = capsys.readouterr().out.splitlines()
    whose = "yours" if chosen is right else "ours"
    assert lines[0].startswith(mark)
    assert lines[1:] == [f"   The cells below use {whose}."]


def test_without_that_a_check_returns_nothing_that_a_notebook_would_show() -> None:
    assert doubled(right) is None


@check
def asks_everybody(answer: Any) -> None:
    """Each node gets a message."""
    grid = watch(WatchedGrid(toy_app(), 2))
    answer(grid)
    asked = {arrow.node_id for arrow in grid.arrows() if not arrow.is_reply}
    expect("who was asked", asked, {2, 3})


def asks(node_ids: list[int]) -> Callable[[WatchedGrid], None]:
    def ask(grid: WatchedGrid) -> None:
        list(grid.push_messages([Message(RecordDict(), n, "query", ttl=60) for n in node_ids]))

    return ask


def test_a_wrong_loop_can_be_seen_until_another_check_is_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, str]] = []
    monkeypatch.setattr("course.verdict.show", lambda *picture: shown.append(picture))
    asks_everybody(asks([2]))
    assert capsys.readouterr().out.splitlines()[1].endswith("checks.show_messages()")
    checks.show_messages()
    [(figure, words)] = shown
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["server", "node 2"]
    assert len(words.split()) >= 5
    asks_everybody(asks([2, 3]))
    assert capsys.readouterr().out.splitlines() == ["✅ ask: right."]
    checks.show_messages()
    assert "Nothing to show" in capsys.readouterr().out and len(shown) == 1


def forgets_to_return(x: int) -> Any:
    y = 2 * x
    y += 0


def begun(x: int) -> Any:
    y = 2 * x
    y += 0
    ...


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (forgets_to_return, "❌ forgets_to_return: it returned nothing. Is there a `return`?"),
        (begun, "⏳ begun: not yet."),
        (stub, "⏳ stub: not yet."),
        (lambda x: ..., "⏳ <lambda>: not yet."),
        (None, "⏳ doubled: not yet."),
    ],
)
def test_a_forgotten_return_is_told_from_a_stub(
    answer: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    doubled(answer)
    assert capsys.readouterr().out.startswith(line)


@check
def leaves_its_argument(answer: Any) -> None:
    """A function of a list, which may raise."""
    with on_error(Exception, "What is in the list?"):
        answer([1, 2])


def test_a_verdict_passes_through_the_hint_for_errors(capsys: pytest.CaptureFixture[str]) -> None:
    leaves_its_argument(lambda numbers: numbers.clear())
    said = "❌ <lambda>: it changes its argument [1, 2] to []. The caller still needs it.\n"
    assert capsys.readouterr().out == said
    leaves_its_argument(lambda numbers: numbers[2])
    assert "it raised IndexError: list index out of range. What is" in capsys.readouterr().out


@check
def untouched(answer: Any) -> None:
    """A large tensor stays as it was."""
    state = {"w": torch.zeros(5000)}
    expect("the number of tensors", answer(state, other=torch.zeros(3)), 1)


def spoils_a_large_one(state: Any, other: Any) -> int:
    state["w"][2500] += 1e-9
    return len(state)


def spoils_what_has_a_name(state: Any, other: Any) -> int:
    other += 1
    return len(state)


@pytest.mark.parametrize("answer", [spoils_a_large_one, spoils_what_has_a_name])
def test_a_changed_argument_is_noticed_whatever_its_size_and_however_it_is_given(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    untouched(answer)
    assert "it changes its argument" in capsys.readouterr().out


def leaves(x: int) -> int:
    raise SystemExit(2)


def test_a_check_never_raises_and_never_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    doubled(leaves)
    assert "it raised SystemExit" in capsys.readouterr().out
    named(lambda: "x" * 10**6)
    assert len(capsys.readouterr().out) < 500


@check
def named(answer: Any) -> None:
    """A name."""
    expect("a name", answer(), "y")
