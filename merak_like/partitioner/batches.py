"""A step's samples divided over replicas and micro-batches: ``batch = dp * micro_batches * micro_batch``."""

from __future__ import annotations

from merak_like.partitioner.graph import ProxyGraph

PER_STAGE = (1, 2, 4, 8, 16)
"""Micro-batches per stage that are tried when the user leaves the choice."""


def traced_samples(graph: ProxyGraph) -> int:
    """Samples in the traced example: the leading dimension of the first input (1 if there is none)."""
    for op in graph.ops:
        if op.kind == "input" and op.outputs and op.outputs[0].shape:
            return max(op.outputs[0].shape[0], 1)
    return 1


def divisors(number: int) -> tuple[int, ...]:
    """In rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def divide(batch: int, dp: int, pp: int, micro_batches: int | None, micro_batch: int | None) -> tuple[int, ...]:
    """The numbers of micro-batches to try: one if the user said how many or how large, else a few that divide evenly.

    Raises ValueError, with the nearest values that work, for samples that do not divide evenly.
    """
    for name, number in (("batch", batch), ("micro_batches", micro_batches), ("micro_batch", micro_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number} is not a number of samples: give a whole number of at least 1")
    if batch % dp:
        raise ValueError(
            f"batch = {batch} samples cannot be shared evenly by dp = {dp} replicas: "
            f"use batch {_near(batch, dp)}, or dp {_nearest(divisors(batch), dp)}"
        )
    each = batch // dp
    if micro_batches is not None and micro_batch is not None and micro_batches * micro_batch != each:
        raise ValueError(
            f"dp * micro_batches * micro_batch = {dp} * {micro_batches} * {micro_batch} = "
            f"{dp * micro_batches * micro_batch}, but batch is {batch}: leave one of them out"
        )
    for name, number in (("micro_batches", micro_batches), ("micro_batch", micro_batch)):
        if number is not None and each % number:
            raise ValueError(
                f"batch = {batch} does not divide by dp * {name} = {dp} * {number} = {dp * number}: "
                f"use batch {_near(batch, dp * number)}, or {name} {_nearest(divisors(each), number)}"
            )
    if micro_batches is not None:
        return (micro_batches,)
    if micro_batch is not None:
        return (each // micro_batch,)
    return tuple(sorted({_nearest(divisors(each), pp * times) for times in PER_STAGE}))


def _near(number: int, step: int) -> str:
    """The multiples of a step around a number."""
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if below else f"{above}"


def _nearest(numbers: tuple[int, ...], wanted: int) -> int:
    return min(numbers, key=lambda n: (max(n / wanted, wanted / n), n))
