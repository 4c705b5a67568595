"""Notebook 07: questions with a deadline."""

from types import SimpleNamespace

from course.verdict import Answer, check, expect, on_error


@check
def yes_rate(answer: Answer) -> None:
    """Warner's estimate of the true yes-rate, from noisy answers."""
    hint = "How many of the yeses came from a coin, and how many nodes told the truth?"
    slips = {"A sign is wrong: do coins add to the truth?": 1.3}
    expect("40 % said yes, half told the truth", answer(0.4, 0.5), 0.3, hint, slips)
    expect("70 % said yes, 80 % told the truth", answer(0.7, 0.8), 0.75, hint)


@check
def volunteers(answer: Answer) -> None:
    """How many nodes opt in before the time-out, on average."""
    late, never_late = "Who says yes, and who is in time?", "Can more than all nodes be in time?"
    expect("81 nodes, yes 0.9, delays up to 4 s, time-out 1 s", answer(81, 0.9, 4, 1), 18.225, late)
    expect("50 nodes, yes 0.5, up to 2 s, time-out 5 s", answer(50, 0.5, 2, 5), 25, never_late)
    with on_error(ZeroDivisionError, "And without any delay?"):
        expect("50 nodes, yes 0.5, no delay, time-out 1 s", answer(50, 0.5, 0, 1), 25, never_late)


@check
def collect_in_time(answer: Answer) -> None:
    """A poll loop that ends: everything has come, or the deadline has."""
    longest_rest_s = 0.1  # as the exercise says

    def play(dues: list[int], timeout_s: float) -> tuple[Answer, float]:
        box = SimpleNamespace(now=100.0, due=[100 + due for due in dues], calls=0, pulls=0)

        def pass_time(seconds: float) -> None:
            box.now, box.calls = box.now + seconds, box.calls + 1
            expect("does it go on for ever", box.calls > 20_000, False, "What ends the loop?")

        def pull() -> list[str]:
            pass_time(0.001)
            box.pulls += 1
            came = [due for due in box.due if due <= box.now]
            box.due = [due for due in box.due if due > box.now]
            return [f"reply {due - 100:g}" for due in came]

        def clock() -> float:
            pass_time(0.0001)
            return float(box.now)

        def sleep(seconds: float) -> None:
            longest = f"at most {longest_rest_s} s"
            rest = longest if seconds <= longest_rest_s + 1e-9 else f"{seconds:g} s"
            expect("how long it rests at a time", rest, longest, "Who waits for it meanwhile?")
            pass_time(max(0, seconds))

        got = answer(pull, len(dues), timeout_s, clock, sleep)
        often = box.pulls > 500 * (box.now - 100) + 10
        expect("more than 500 pulls a second", often, False, "Does it ever rest?")
        return got, box.now - 100

    hint = "Until when? Are earlier pulls kept?"
    for dues, timeout_s, came, over in (([1, 4, 7], 5, 2, 5), ([1, 2], 60, 2, 2)):
        asked = f"replies due after {dues} s, time-out {timeout_s} s"
        replies, seconds = play(dues, timeout_s)
        expect(asked, replies, [f"reply {due}" for due in dues[:came]], hint)
        on, why = seconds > over + 2 * longest_rest_s, "Why wait on?"
        expect(f"{asked}: did it wait on for long after {over} s", on, False, why)
