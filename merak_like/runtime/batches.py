"""A batch becomes micro-batches: who gets which rows, and what each weighs in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LossWeight = Callable[[Any], int]
"""How many items a micro-batch's mean loss is the mean of: target tokens, or samples."""


def rows(batch: Any) -> int:
    """Samples in a batch: the size of dimension 0 of its first tensor that has one. Raises ValueError without one."""
    for tensor in _tensors(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError("the batch has no tensor with a batch dimension: it cannot be split into micro-batches")


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into parts along dimension 0 of every tensor that has the batch's size; sizes differ by at most 1.

    Other leaves (scalars, None, tensors of another size) go to every part. Raises ValueError for more parts than rows.
    """
    total = rows(batch)
    if parts > total:
        raise ValueError(
            f"a batch of {total} samples cannot be cut into {parts} micro-batches (dp x micro_batches): use a batch "
            f"of at least {parts} samples or at most {total} micro-batches"
        )
    bounds = [total * i // parts for i in range(parts + 1)]
    return [_rows(batch, total, start, stop) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class Outline:
    """A batch, and what each micro-batch counts, for ranks that cannot count because they have not loaded all of it.

    Tensors on the meta device stand for those that are not here.
    """

    batch: Any
    items: tuple[int, ...]
    times: int = 1
    """How often each row is in it."""


def weighed(batch: Any, parts: int, prepare: Callable[[Any], Any], weigh: LossWeight) -> tuple[list[Any], list[int]]:
    """The micro-batches of a batch, or of its outline, as the model takes them, and what each counts in the loss."""
    if isinstance(batch, Outline):
        return split(prepare(batch.batch), parts), list(batch.items)
    made = split(prepare(batch), parts)
    return made, [weigh(part) for part in made]


def refuse_empty(empty: float, batch_is_global: bool) -> None:
    """Raise ValueError where a batch, or a replica's share of it, has nothing that counts."""
    if empty:
        raise ValueError(
            f"{'the batch has' if batch_is_global else 'a replica has'} no item to learn from (every label is "
            "ignored), so its mean loss is not a number: leave such samples out, or put them beside others"
        )


def filled(parts: Sequence[Any], weights: Sequence[int]) -> list[Any]:
    """The parts to learn from, and one that has items in the place of each that has none.

    What has none has no share in the loss, but its own mean would be 0/0, and so would be its gradients.
    """
    some = next(part for part, weight in zip(parts, weights, strict=True) if weight)
    return [part if weight else some for part, weight in zip(parts, weights, strict=True)]


def samples(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start <= i < stop`` of a batch."""
    return _rows(batch, rows(batch), start, stop)


def _rows(item: Any, total: int, start: int, stop: int) -> Any:
    if isinstance(item, Tensor):
        return item[start:stop] if item.dim() and item.shape[0] == total else item
    if isinstance(item, Mapping):
        return {key: _rows(value, total, start, stop) for key, value in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_rows(x, total, start, stop) for x in item))
    if isinstance(item, (tuple, list)):
        return type(item)(_rows(x, total, start, stop) for x in item)
    return item


def enough(batch: Any, parts: int) -> tuple[Any, int]:
    """A batch of at least ``parts`` rows, and how often each row is in it: repeating all leaves every mean as it is."""
    size = rows(batch)
    times = -(-parts // size)
    return (batch, 1) if times == 1 else (_repeated(batch, size, times), times)


def _repeated(item: Any, size: int, times: int) -> Any:
    if isinstance(item, Tensor):
        return torch.cat([item] * times) if item.dim() and item.shape[0] == size else item
    if isinstance(item, Mapping):
        return {key: _repeated(value, size, times) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(_repeated(value, size, times) for value in item)
    return item


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        return [t for value in item.values() for t in _tensors(value)]
    if isinstance(item, (tuple, list)):
        return [t for value in item for t in _tensors(value)]
    return []


def signature(batch: Any) -> tuple[Any, ...]:
    """What a trace depends on: the shapes and dtypes of tensors and the other leaves themselves."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape), batch.dtype, batch.requires_grad)
    if isinstance(batch, Mapping):
        return tuple((key, signature(value)) for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(signature(value) for value in batch)
    return (type(batch).__name__, batch if isinstance(batch, (bool, int, float, str, type(None))) else id(batch))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(x, device) for x in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(x, device) for x in batch)
    return batch
