"""One step, done: its arguments filled in and its function called, in float64 and without dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Where
from merak_like.partitioner.tensor_parallel.rewritten import grouped_mm
from merak_like.partitioner.tracer.fine import Name, Step

RANDOM = frozenset("rand randn randint rand_like randn_like bernoulli uniform normal exponential multinomial".split())
WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


def wide(value: Any) -> Any:
    """A tensor in float64 (complex128), anything else as it is."""
    return value.to(WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def arguments(step: Step, sizes: Mapping[Where, int], tensor: Callable[[Name], Any]) -> tuple[Any, dict[str, Any]]:
    """Positional and keyword arguments with tensors for Names, other sizes for constants, everything in float64."""

    def word(item: Any, path: tuple[Any, ...]) -> Any:
        if (size := sizes.get((step.name, path))) is not None:
            return size
        if isinstance(item, Name):
            return tensor(item)
        if isinstance(item, (tuple, list)):
            return type(item)([word(x, (*path, i)) for i, x in enumerate(item)])
        if isinstance(item, dict):
            return {key: word(x, (*path, key)) for key, x in item.items()}
        if isinstance(item, slice):
            return slice(*(word(getattr(item, k), (*path, k)) for k in ("start", "stop", "step")))
        return WIDER.get(item, item) if isinstance(item, torch.dtype) else item

    return word(step.args, ()), word(dict(step.kwargs), ())


def perform(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a step gives that is no module."""
    word = step.word
    if word in ("dropout", "dropout1d", "dropout2d", "alpha_dropout"):
        return args[0]
    if word == "scaled_dot_product_attention" and "dropout_p" in kwargs:
        kwargs["dropout_p"] = 0.0
    if word in ("_grouped_mm", "grouped_mm"):
        return grouped_mm(*args, **kwargs)
    if word in RANDOM:
        torch.manual_seed(step.index)
    if isinstance(step.target, str):
        method = "double" if word in ("float", "half", "bfloat16") and not args[1:] else step.target
        return getattr(args[0], method)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)
