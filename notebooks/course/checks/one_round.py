"""Notebook 05: one round on the server."""

from types import SimpleNamespace

from course.verdict import Answer, check, expect, on_error


@check
def who_is_missing(answer: Answer) -> None:
    """Nodes without a usable reply, told by ``reply_to_message_id``."""

    def reply(to: str, source: int, failed: bool = False) -> SimpleNamespace:
        metadata = SimpleNamespace(reply_to_message_id=to, src_node_id=source)
        return SimpleNamespace(metadata=metadata, has_error=lambda: failed)

    asked, late = {"a": 11, "b": 22, "c": 33, "d": 44}, reply("z", 22)
    replies = [reply("c", 33, failed=True), late, reply("a", 11), reply("d", 1, failed=True)]
    expect("nothing came", answer({"a": 11}, []), {11})
    question = "11 answers, 33 fails, for 44 there is a note of failure, 22 answers an old message"
    with on_error(KeyError, "Is each reply one to these messages?"):
        missing = answer(asked, replies)
    expect(question, missing, {22, 33, 44}, "To what is it a reply? Is it usable?")


@check
def ideal_round(answer: Answer) -> None:
    """Seconds until the last of some tasks, taken in order by whichever worker is free."""
    tasks = [2.0, 3.0, 4.0, 1.0, 5.0]
    expect(f"{tasks}, 1 worker", answer(tasks, 1), 15.0)
    hint = "Is the given order kept? Who is free when the fourth starts?"
    expect(f"{tasks}, 2 workers", answer(tasks, 2), 9.0, hint)
    expect(f"{tasks}, 9 workers", answer(tasks, 9), 5.0, "Can a task be shared?")
