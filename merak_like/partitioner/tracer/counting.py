"""Flops and bytes of one torch function call, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from merak_like._compat import storage_key
from merak_like.partitioner.tracer.words import in_place

Counter = Callable[[Sequence[Any], Mapping[str, Any], torch.Tensor], int]


def _matmul(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    return 2 * out.numel() * args[0].shape[-1]


def _addmm(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    first = args[1] if len(args) > 1 else next(v for k, v in kwargs.items() if k in ("mat1", "batch1", "vec1"))
    return 2 * out.numel() * first.shape[-1]


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return 2 * out.numel() * prod(weight.shape[1:])


def _transposed_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return 2 * args[0].numel() * prod(weight.shape[1:])


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    query, key = (args[0], args[1]) if len(args) > 1 else (kwargs["query"], kwargs["key"])
    return 4 * query.numel() * key.shape[-2]


def _grouped_mm(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    return 2 * out.numel() * args[0].shape[-1]


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> int:
    equation, operands = args[0], args[1:]
    if not isinstance(equation, str) or "." in equation:
        return 2 * out.numel()
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=False):
        sizes.update(zip(letters, operand.shape, strict=False))
    return len(operands) * prod(sizes.values())


FLOPS: Mapping[str, Counter] = {
    "linear": _matmul, "matmul": _matmul, "__matmul__": _matmul, "mm": _matmul, "bmm": _matmul, "mv": _matmul,
    "addmm": _addmm, "baddbmm": _addmm, "addbmm": _addmm, "addmm_": _addmm, "baddbmm_": _addmm,
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "conv_transpose1d": _transposed_convolution, "conv_transpose2d": _transposed_convolution,
    "conv_transpose3d": _transposed_convolution,
    "scaled_dot_product_attention": _attention, "einsum": _einsum,
    "grouped_mm": _grouped_mm, "_grouped_mm": _grouped_mm,
}  # fmt: skip
"""Matrix-like functions by name; everything else counts one flop per output element."""


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of plain nested arguments (fast: no registry look-ups)."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    found: list[torch.Tensor] = []
    if isinstance(tree, (tuple, list, dict, slice)):
        _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, dict):
        tree = tree.values()
    elif isinstance(tree, slice):
        tree = (tree.start, tree.stop, tree.step)
    for item in tree:
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict, slice)):
            _collect(item, found)


def count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], outs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Flops and bytes moved by one call; a call that only makes views moves nothing and counts nothing."""
    if not outs:
        return 0, 0
    ins = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
    if not in_place(name):
        storages = {storage_key(t) for t in ins}
        if all(storage_key(t) in storages for t in outs):
            return 0, 0
    moved = sum(t.numel() * t.element_size() for t in (*ins, *outs))
    if name == "embedding":  # reads only the rows it looks up
        moved = 2 * outs[0].numel() * outs[0].element_size()
    counter = FLOPS.get(name)
    try:
        flops = counter(args, kwargs, outs[0]) if counter else sum(t.numel() for t in outs)
    except (IndexError, KeyError, StopIteration, AttributeError):  # an unusual call form: an estimate will do
        flops = sum(t.numel() for t in outs)
    return flops, moved
