"""Whether a second forward would compute the same: attributes that change, numbers that Python draws."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from merak_like.partitioner.tracer.errors import TraceError

if TYPE_CHECKING:
    from merak_like.partitioner.tracer import Trace


def same_code(one: fx.Graph, two: fx.Graph) -> bool:
    """Whether two graphs are equal node by node."""
    first, second = ([(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in g.nodes] for g in (one, two))
    return first == second


def accept_changes(one: fx.Graph, two: fx.Graph, attributes: list[str]) -> None:
    """Attributes of the model changed between two passes: warn, or raise TraceError if that made a difference."""
    if not same_code(one, two):
        raise TraceError(
            f"forward changes the attributes {attributes} of the model and computes something else at the next call: a "
            "recorded graph cannot follow; register them as buffers, or move them into a sub-module, which can stay "
            "whole"
        )
    warnings.warn(
        f"forward changes the attributes {attributes} of the model itself at every call; they did not change what it "
        "computes, and training will leave them alone",
        stacklevel=5,
    )


@contextmanager
def same_chance() -> Iterator[None]:
    """Leave every random number generator as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def surely(record: Callable[[], Trace]) -> Trace:
    """Record, and once more with other numbers if Python drew any: a graph that they change would be frozen chance."""
    with same_chance():
        python, numpy = random.getstate(), np.random.get_state(legacy=False)
        found = record()
        if random.getstate() == python and _same(np.random.get_state(legacy=False), numpy):
            return found
        for seed in range(4):
            random.seed(seed)
            np.random.seed(seed)
            other = record()
            if not same_code(found.code, other.code) or not _same(found.constants, other.constants):
                raise TraceError(
                    "forward draws random numbers from Python's random or from numpy, and a recorded graph would "
                    "repeat the first ones for ever: draw them with torch, or switch that off (layer drop, masking)"
                )
        return found


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    return one is two or type(one) is type(two)
