"""How long a codec takes, measured here: it is run on random numbers, a few milliseconds each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.links import Spec
from merak_like.split.exchange import Way

MOST = 2**18
"""Elements that are tried; more are taken to take longer in proportion."""
VISITS = 3
"""The first visit of samples may be another thing than the later ones."""


@dataclass(frozen=True)
class Coding:
    """Seconds to make a frame and to read it."""

    encode: float
    decode: float


Measure = Callable[[str, Spec, Way], Coding]
"""Seconds of a codec, by its text, for a value that goes one way."""


def timed(text: str, spec: Spec, way: Way) -> Coding:
    """Measured, once for each codec, shape and dtype."""
    shape = tuple(spec.shape) or (1,)
    each = max(1, torch.Size(shape[1:]).numel())
    few = max(1, min(shape[0], MOST // each))
    found = _timed(text, (few, *shape[1:]), spec.dtype, way)
    return Coding(found.encode * shape[0] / few, found.decode * shape[0] / few)


@cache
def _timed(text: str, shape: tuple[int, ...], dtype: torch.dtype, way: Way) -> Coding:
    here, there = codec(text), codec(text)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = Coding(float("inf"), float("inf"))
    for step in range(VISITS):
        for direction in ("forward", "backward")[: 1 + (way == "backward")]:
            context = Context(step, direction=direction, samples=tuple(range(shape[0])))
            one, two = (here, there) if direction == "forward" else (there, here)
            began = time.perf_counter()
            frame = one.encode(x, context)
            made = time.perf_counter()
            two.decode(frame, context)
            took = Coding(made - began, time.perf_counter() - made)
        if step:
            best = Coding(min(best.encode, took.encode), min(best.decode, took.decode))
    return best
