"""A device that is paced: matrix products take the time a slow device would need, other work on tensors takes none.

Nothing is computed: results are zeros. Eight ranks on two cores then show their schedule, their transfers and their
collectives, which are real, and not how they share the cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from merak_like._compat import TorchDispatchMode
from merak_like.partitioner.hardware import Hardware, Link

FLOPS = 6e9
"""Of a paced device, per second: a block's forward on one micro-batch takes 70 ms."""
SLOW = 2
"""Time runs so many times slower: sleeps are longer and cables slower by it, and measured seconds are divided by it, so
that what eight processes do on two cores besides weighs less (as in Gupta et al., NSDI 2006)."""
DEVICES = 4
"""Of a node."""
BETWEEN = 1e9 / 8
"""Bytes per second of each node's cable."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "67108864"}
"""For the environment: larger blocks are fresh pages of zeros, and the others stay with the process."""
SMALL = 4096
"""Numbers in a tensor that it does not pay to leave uncomputed."""

PACED = Hardware(
    name="paced", peak_flops={"float32": FLOPS}, memory_bytes=16 * 10**9, memory_bandwidth=1e15, efficiency=1.0,
    half_flops=0.0, launch_seconds=0.0, intra=Link(5e8, 5e-4), inter=Link(BETWEEN / DEVICES, 1e-3),
    devices_per_node=DEVICES,
    source="flops and the cable as set; the links within a node assumed for processes of gloo on 2 cores",
)  # fmt: skip

aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2)}
"""Which arguments are multiplied."""

UNDEFINED = {aten.log.default}
"""At zero, which stands for what was not computed: small ones give zeros too, or the loss would not be a number."""

MAKING = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default}
RESHAPING = {"aten::set_", "aten::resize_", "aten::t_", "aten::transpose_", "aten::unsqueeze_", "aten::squeeze_"}
"""Operations in place that are about shapes and memory and not about numbers."""

Nothing = Callable[[Any], Any]
"""What an operation that is not done gives, from its first argument."""


class Pace(TorchDispatchMode):
    """Sleep for the flops of each product; leave out the rest, once its first call has shown what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Nothing | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return _product(*(args[place] for place in PRODUCTS[func]))
        if func in UNDEFINED:
            return _zeros(args[0].shape, args[0].dtype)
        if func.namespace != "aten" or func in MAKING:
            return func(*args, **kwargs)
        try:
            key = (func, *_outline(args), *_outline(kwargs.items()))
            known = self._known.get(key, ...)
        except TypeError:  # an argument that cannot be a key
            return func(*args, **kwargs)
        if known is ...:
            made = func(*args, **kwargs)
            self._known[key] = _nothing(func, args, kwargs, made)
            return made
        return func(*args, **kwargs) if known is None else known(args[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    begin = time.perf_counter()
    made = _zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    seconds = 2 * made.numel() * a.shape[-1] / FLOPS
    time.sleep(max(0.0, SLOW * seconds - (time.perf_counter() - begin)))
    return made


def _outline(args: Any) -> Iterator[Any]:
    """Arguments with tensors as their shapes."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg.shape, arg.stride(), arg.dtype
        elif isinstance(arg, list | tuple):
            yield tuple(_outline(arg))
        else:
            yield arg


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _large(tensors: list[Tensor]) -> bool:
    return all(t.is_floating_point() for t in tensors) and sum(t.numel() for t in tensors) >= SMALL


def _nothing(func: Any, args: Any, kwargs: Any, made: Any) -> Nothing | None:
    """What stands for the operation from now on; None where it has to be done: views, small or whole numbers."""
    given = list(_tensors((*args, *kwargs.values())))
    if func._schema.is_mutable:
        name = func._schema.name
        if name in RESHAPING or not (name.endswith("_") and given and _large(given[:1])):
            return None
        return (lambda first: first) if isinstance(made, Tensor) else (lambda first: None)
    found = list(_tensors([made]))
    before = {t.untyped_storage().data_ptr() for t in given}
    fresh = all(t.untyped_storage().data_ptr() not in before for t in found)
    if not (isinstance(made, Tensor | tuple | list) and found and fresh and _large(found)):
        return None
    shapes = [(t.shape, t.dtype, t.stride()) for t in found]
    if isinstance(made, Tensor):
        return lambda first: _zeros(*shapes[0])
    if len(found) != len(made):
        return None
    return lambda first: type(made)(_zeros(*shape) for shape in shapes)


def _zeros(size: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    """Memory that costs nothing until somebody writes there: see ``MALLOC`` for how large it has to be."""
    flat = torch.from_numpy(numpy.zeros(math.prod(size) * dtype.itemsize, dtype=numpy.uint8)).view(dtype)
    return flat.view(size) if stride is None else flat.as_strided(size, stride)
