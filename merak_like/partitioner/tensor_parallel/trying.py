"""Ask a function itself whether it works element by element: custom autograd functions have no row in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tracer.fine import Name, Step

LENGTH = 6


def commutes(step: Step, shapes: Mapping[Name, tuple[int, ...]]) -> bool:
    """Whether taking every second element before a custom function is the same as taking it after.

    Tried on random numbers, forward and backward, for functions of tensors of one shape that give such a tensor. A
    function that is right on these by chance is still found out by the numeric probe of the block.
    """
    names = [name for _, name in flatten((step.args, step.kwargs))]
    apply = getattr(getattr(step.target, "cls", None), "apply", None)
    if apply is None or step.value is None or not names or {shapes.get(n) for n in names} != {step.value.shape}:
        return False
    made = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(LENGTH, LENGTH, generator=made, dtype=torch.float64) for name in names}
    seed = torch.randn(LENGTH, LENGTH, generator=made, dtype=torch.float64)
    try:
        whole = _run(step, apply, draw, seed)
        for dim in range(2):
            index = torch.arange(0, LENGTH, 2)
            part = _run(
                step, apply, {n: t.index_select(dim, index) for n, t in draw.items()}, seed.index_select(dim, index)
            )
            if not all(torch.equal(w.index_select(dim, index), p) for w, p in zip(whole, part, strict=True)):
                return False
    except Exception:  # whatever a stranger's function raises on such tensors, it is not element by element
        return False
    return True


def _run(step: Step, apply: Any, values: Mapping[Name, Tensor], seed: Tensor) -> list[Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}

    def word(item: Any) -> Any:
        if isinstance(item, Name):
            return leaves[item]
        return type(item)(word(x) for x in item) if isinstance(item, (tuple, list)) else item

    out = apply(*word(step.args))
    grads = torch.autograd.grad(out, list(leaves.values()), seed, allow_unused=True)
    return [out.detach(), *(grad for grad in grads if grad is not None)]
