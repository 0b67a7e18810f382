"""The learning rate at a step, as a pure function: nothing to save, nothing to restore.

1 |   ____________          constant      rises during the warm-up, then stays
  |  /  \\_      \\          linear        falls in a line
  | /     \\__    \\         cosine        falls in half a cosine
0 |/         \\_   \\        wsd           stays, and falls in a line at the end (warm-up, stable, decay)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from merak_like.trainer.settings import Schedule

Shape = Callable[[float], float]
"""From the share of the way after the warm-up, 0 to 1, to the share of the way down, 0 to 1."""

SHAPES: Mapping[str, Callable[[Schedule, int, int], Shape]] = {
    "constant": lambda schedule, warmup, steps: lambda x: 0.0,
    "linear": lambda schedule, warmup, steps: lambda x: x,
    "cosine": lambda schedule, warmup, steps: lambda x: 0.5 * (1.0 - math.cos(math.pi * x)),
    "wsd": lambda schedule, warmup, steps: _late(schedule.decay * steps / max(1, steps - warmup)),
}


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The factor of the learning rate at a step, counted from 0, of so many.

    Warm-up starts at 0, as in transformers: its first step changes nothing but the optimizer's state.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return step / max(1, warmup)
    way = min(1.0, (step - warmup) / max(1, steps - warmup))
    down = SHAPES[schedule.name](schedule, warmup, steps)(way)
    return 1.0 - (1.0 - schedule.end) * down


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Whole steps of the warm-up. Raises ValueError where it is longer than the training."""
    asked = math.ceil(schedule.warmup * steps) if schedule.warmup < 1 else int(schedule.warmup)
    if asked > steps:
        raise ValueError(
            f"schedule.warmup = {asked} steps, but training has {steps}: use fewer, or a share such as 0.1"
        )
    return asked


def _late(share: float) -> Shape:
    return lambda x: max(0.0, 1.0 - (1.0 - x) / share) if share > 0 else 0.0
