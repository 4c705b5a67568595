"""The learning rate as a pure function of the round.

Nothing is stored and nothing is mutated, so a resumed run computes the same rates. The server
evaluates the function once a round and sends the rate inside the TRAIN message: a scheduler
kept by a client would count only the rounds in which that client happened to be sampled.
"""

import math

SCHEDULES = ("constant", "step", "exponential", "cosine")


def learning_rate(
    server_round: int,
    num_server_rounds: int,
    *,
    initial: float,
    schedule: str = "exponential",
    decay: float = 0.5,
    step_size: int = 5,
    final_fraction: float = 0.1,
) -> float:
    """Return the learning rate of one round, counted from 1.

    ``initial`` is the rate of round 1, ``decay`` the factor per ``step_size`` rounds: at once
    (``step``) or evenly (``exponential``). Only ``cosine`` looks at ``num_server_rounds``; in the
    last of them it ends with ``final_fraction`` of the initial rate.

    Source: the cosine is Loshchilov & Hutter, "SGDR", arXiv:1608.03983, eq. 5, without restarts.
    """
    elapsed = server_round - 1
    if schedule == "constant":
        return initial
    if schedule == "step":
        return initial * math.pow(decay, elapsed // step_size)
    if schedule == "exponential":
        return initial * math.pow(decay, elapsed / step_size)
    if schedule == "cosine":
        cosine = (1 + math.cos(math.pi * elapsed / max(1, num_server_rounds - 1))) / 2
        return initial * (final_fraction + (1 - final_fraction) * cosine)
    raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
