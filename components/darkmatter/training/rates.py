"""Schedules: pure functions of the step."""

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine down to 0 at step `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, peak, 0.0, total=max(1, total - warmup))


def cosine(step: int, start: float, end: float, *, total: int) -> float:
    """From `start` at step 0 to `end` at step `total` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2
