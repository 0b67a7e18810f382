"""DeepSpeed's learning-rate schedules as functions of the step.

DeepSpeed steps a schedule after the optimizer, so step n (from 0) learns at the rate that its ``get_lr`` gives for
``last_batch_iteration = n - 1``, and step 0 at the lowest (deepspeed 0.19, runtime/lr_schedules.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Rate = Callable[[int, float], float]
"""From a step and a group's own rate to the rate it learns at."""


def warmup(
    *, warmup_min_lr: float = 0.0, warmup_max_lr: float | None = None, warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Rate:  # fmt: skip
    """``WarmupLR``: rise to ``warmup_max_lr`` (None: the group's own rate), then stay."""
    return _warm(warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, lambda step, warm: 1.0)


def warmup_decay(
    *, total_num_steps: int, warmup_min_lr: float = 0.0, warmup_max_lr: float = 0.001, warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Rate:  # fmt: skip
    """``WarmupDecayLR``: the same, then fall on a line to 0 at the last step."""

    def after(step: int, warm: int) -> float:
        return max(0.0, (total_num_steps - step) / max(1.0, total_num_steps - warm))

    return _warm(warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, after)


def warmup_cosine(
    *, total_num_steps: int, warmup_min_ratio: float = 0.0, warmup_num_steps: int = 1000, cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> Rate:  # fmt: skip
    """``WarmupCosineLR``: rise to the group's own rate, then fall on a cosine to ``cos_min_ratio`` of it."""
    warm = max(2, warmup_num_steps)

    def rate(step: int, own: float) -> float:
        if step == 0:
            return 0.0
        if step - 1 < warm:
            return own * (warmup_min_ratio + (1 - warmup_min_ratio) * _rise(step - 1, warm, warmup_type))
        progress = min(1.0, (step - warm) / max(1, total_num_steps - warm))
        return own * max(0.0, cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)

    return rate


SCHEDULES: Mapping[str, Callable[..., Rate]] = {
    "WarmupLR": warmup, "WarmupDecayLR": warmup_decay, "WarmupCosineLR": warmup_cosine
}  # fmt: skip
"""By the name in the configuration."""


def rate_of(name: Any, params: Mapping[str, Any]) -> Rate:
    """The schedule of that name. Raises ValueError for one that is not there, and for parameters that it has not."""
    if name not in SCHEDULES:
        raise ValueError(
            f"scheduler.type = {name!r} is none of {', '.join(SCHEDULES)}: use one of them, or leave the scheduler out "
            "and use torch's on engine.optimizer"
        )
    if params.get("warmup_type", "log") not in ("log", "linear"):
        raise ValueError(f"scheduler.params.warmup_type = {params['warmup_type']!r}: it is log or linear")
    try:
        return SCHEDULES[name](**params)
    except TypeError as error:
        raise ValueError(f"scheduler.params of {name}: {str(error).partition('() ')[2]}") from None


def _warm(least: float, most: float | None, steps: int, kind: str, after: Callable[[int, int], float]) -> Rate:
    warm = max(2, steps)

    def rate(step: int, own: float) -> float:
        if step == 0:
            return least
        share = _rise(step - 1, warm, kind) if step - 1 < warm else after(step - 1, warm)
        return least + ((own if most is None else most) - least) * share

    return rate


def _rise(step: int, warm: int, kind: str) -> float:
    return step / warm if kind == "linear" else math.log(step + 1) / math.log(warm)
