"""Results of functions that fake tensors cannot run: by a shape rule, or by running them on the example's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from merak_like._compat import FakeTensor, unset_fake
from merak_like.partitioner.tracer.shadow import Unknowable


def _grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """(n, k) x (groups, k, m) -> (n, m): the fake kernel only accepts bfloat16."""
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        return None
    return torch.matmul(mat_a, mat_b[0])


SHAPE_RULES: Mapping[str, Callable[..., torch.Tensor | None]] = {"_grouped_mm": _grouped_mm, "grouped_mm": _grouped_mm}
"""Functions whose fake kernel is missing or too strict; None means the fake kernel will do."""


def run_with_real(
    func: Callable[..., Any], name: str, args: Any, kwargs: Any, value: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """Run a function whose result's shape depends on data, on the example's data, and fake the result.

    Integers and masks must have known data; floating-point tensors only lend their shape. Raises Unknowable.
    """

    def real(item: Any) -> Any:
        if isinstance(item, FakeTensor):
            if item.is_floating_point() and name not in ("nonzero", "unique", "argwhere"):
                with unset_fake():
                    return torch.zeros(tuple(item.shape), dtype=item.dtype, requires_grad=item.requires_grad)
            return value(item)
        if isinstance(item, (tuple, list)):
            return type(item)(real(x) for x in item)
        if isinstance(item, slice):
            return slice(real(item.start), real(item.stop), real(item.step))
        return item

    real_args, real_kwargs = real(tuple(args)), {k: real(v) for k, v in kwargs.items()}
    with unset_fake():
        out = func(*real_args, **real_kwargs)
    if not isinstance(out, torch.Tensor):
        if not (isinstance(out, tuple) and all(isinstance(t, torch.Tensor) for t in out)):
            raise Unknowable(f"{name} has no result that a trace can stand in for")
        return tuple(_fake(t) for t in out)
    return _fake(out)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)  # fake: the mode is on
    return made.requires_grad_().clone() if tensor.requires_grad else made  # a clone may be changed in place
