"""Learning-rate schedules, closed form in the step."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(schedule: str, lr: float, step: int, steps: int) -> float:
    """lr at a step t of T.

    constant: lr. quarter_cosine (the paper's code): lr · cos(½π t / (T − 1)).
    cosine (half wave): lr · ½ (1 + cos(π t / (T − 1))).
    """
    fraction = step / max(steps - 1, 1)
    if schedule == "constant":
        return lr
    if schedule == "quarter_cosine":
        return lr * math.cos(0.5 * math.pi * fraction)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * fraction))
    raise ValueError(f"unknown schedule {schedule!r}")
