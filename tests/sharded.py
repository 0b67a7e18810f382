"""What the ranks do in the tests of tensor parallelism. Each runs on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from merak_like.runtime import flat
from tests.scenarios import PARTS, SAMPLES, TOLERANCE, agree, is_statistics, leads
from tests.training import Subject, Trained, by_engine, in_one_precision, plainly
from tests.zoo.case import Batch


@lru_cache(maxsize=4)
def reference(
    name: str, dropout: bool, dtype: str, steps: int, size: tuple[int, ...]
) -> tuple[Subject, list[Batch], Trained | None]:
    """A model, its batches and, on rank 0, what plain training makes of them."""
    one = in_one_precision(name, dropout=dropout, dtype=getattr(torch, dtype))
    batches = [one.batch(*size)] * steps
    return one, batches, plainly(one, batches, PARTS) if leads() else None


def sharded(
    name: str, dp: int, pp: int, tp: int, schedule: str = "1f1b", dropout: bool = True, dtype: str = "float64",
    steps: int = 5, size: Sequence[int] = (SAMPLES,), **more: Any,
) -> float:  # fmt: skip
    """One cell of the matrix, with micro-batches of two sizes: how far the engine is from plain training.

    ``size`` are the samples of a batch and, for some models, its lengths.
    """
    one, batches, plain = reference(name, dropout, dtype, steps, tuple(size))
    ours = by_engine(
        one, batches, dp, pp, PARTS // dp, tp=tp, schedule=schedule, loss_weight=one.weight, **more
    )  # fmt: skip
    return agree(ours, lambda: plain, TOLERANCE[dtype], skip=lambda key: dp > 1 and is_statistics(key))  # type: ignore[arg-type,return-value]


def spread(name: str, dp: int, pp: int, tp: int, zero: int, **more: Any) -> float:
    """The same with replicas that share the optimizer's state; small buckets, so that shares end inside of weights."""
    before, flat.SPREAD_BYTES = flat.SPREAD_BYTES, 2000
    try:
        return sharded(name, dp, pp, tp, steps=3, zero=zero, **more)
    finally:
        flat.SPREAD_BYTES = before
