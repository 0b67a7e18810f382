"""A batch without its content: the shapes, dtypes and plain leaves that a trace depends on, as JSON.

The host traces with a batch of zeros of the same outline, in which only the mask is real (made again from lengths),
and, with a cut without a tail, the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.batches import split
from merak_like.split.halves import LABELS, MASK, Halves
from merak_like.split.messages import Begin
from merak_like.split.wire import WireError

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
LEAST_ID = 10**14
"""Ids of samples have fifteen digits, all of them: a step's bytes are known before it."""
MOST_ELEMENTS = 2**24
MOST_LEAVES = 64
MOST_DIMENSIONS = 8


def outline(batch: Any) -> Any:
    """The outline of a batch of nested mappings, lists and tuples. Raises ValueError for a leaf that has none."""
    if isinstance(batch, Tensor):
        name = str(batch.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"a batch with a tensor of {batch.dtype} cannot be outlined: use {', '.join(DTYPES)}")
        return {"t": name, "s": list(batch.shape)}
    if isinstance(batch, Mapping):
        return {"m": {str(key): outline(value) for key, value in batch.items()}}
    if isinstance(batch, list | tuple):
        return {"l": [outline(value) for value in batch]}
    if batch is None or isinstance(batch, bool | int | float | str):
        return {"v": batch}
    raise ValueError(f"a batch with a {type(batch).__name__} cannot be outlined: use tensors, numbers and None")


def beginning(batch: Any, halves: Halves, samples: Sequence[int] = (), *, training: bool = True) -> Begin:
    """What an edge says of a batch before its micro-batches follow; labels only where it has no tail."""
    labels = None if halves.tailed else batch[LABELS].tolist()
    return Begin(
        outline=outline(batch), digest=halves.digest, training=training, lengths=lengths_of(batch), labels=labels,
        samples=tuple(samples),
    )  # fmt: skip


def blank(said: Any, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
    """A batch of zeros with this outline, its mask and labels given. Raises WireError for a bad or too large one."""
    budget = [MOST_ELEMENTS, MOST_LEAVES]
    given = {MASK: mask, LABELS: labels}

    def made(item: Any, depth: int, name: str) -> Any:
        budget[1] -= 1
        if not isinstance(item, dict) or depth > 4 or budget[1] < 0:
            raise WireError("the outline of the batch is malformed or too large")
        match item:
            case {"t": str(dtype), "s": list(shape), **rest} if not rest and dtype in DTYPES:
                return _tensor(dtype, shape, given.get(name) if depth == 1 else None, name, budget)
            case {"m": dict(entries), **rest} if not rest:
                return {str(key): made(value, depth + 1, str(key)) for key, value in entries.items()}
            case {"l": list(entries), **rest} if not rest:
                return [made(value, depth + 1, "") for value in entries]
            case {"v": (None | bool() | int() | float() | str()) as value, **rest} if not rest:
                return value
        raise WireError("the outline of the batch is malformed")

    return made(said, 0, "")


def _tensor(dtype: str, shape: Sequence[Any], given: Tensor | None, name: str, budget: list[int]) -> Tensor:
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in shape):
        raise WireError(f"the outline of the batch has a tensor of shape {shape!s:.200}")
    count = 1
    for size in shape:
        count *= max(size, 1)
    budget[0] -= count
    if budget[0] < 0:
        raise WireError(f"the outline of the batch claims more than {MOST_ELEMENTS} elements")
    if given is None:
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    if list(given.shape) != list(shape):
        raise WireError(f"{name} is {list(given.shape)}, outlined as {list(shape)}")
    return given.to(getattr(torch, dtype))


def lengths_of(batch: Any) -> tuple[int, ...] | None:
    """The mask of a batch as lengths: of each sample's run of ones, negative where padding stands in front of it.

    Raises ValueError for a mask that is no such run.
    """
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"{MASK} must be (samples, tokens) to travel as lengths, found {tuple(mask.shape)}")
    ones = mask != 0
    counts, width = ones.sum(1), mask.shape[1]
    at = torch.arange(width, device=mask.device)
    right = (ones == (at < counts[:, None])).all(1)
    left = (ones == (at >= width - counts[:, None])).all(1)
    if not bool((right | left).all()):
        raise ValueError(f"{MASK} has holes in it: only padding before or behind a sample travels, as its length")
    return tuple(torch.where(right, counts, -counts).tolist())


def mask_of(lengths: Sequence[int], width: int) -> Tensor:
    """The mask (samples, width) of lengths. Raises WireError for a length beyond the width."""
    if any(abs(n) > width for n in lengths):
        raise WireError(f"a sample is longer than the {width} tokens of its batch")
    counts, at = torch.tensor(lengths, dtype=torch.int64)[:, None], torch.arange(width)
    return torch.where(counts >= 0, at < counts, at >= width + counts).to(torch.int64)


def width_of(said: Any) -> int:
    """The tokens of a sample in an outline with a mask. Raises WireError where it has none."""
    match said:
        case {"m": {"attention_mask": {"s": [int(), int(width)]}}} if 0 <= width <= MOST_ELEMENTS:
            return width
    raise WireError(f"lengths came without an {MASK} (samples, tokens) in the batch's outline")


def batch_of(begin: Begin) -> Any:
    """The batch of a step as far as the host may know it. Raises WireError for what is none."""
    mask = None if begin.lengths is None else mask_of(begin.lengths, width_of(begin.outline))
    return blank(begin.outline, mask, None if begin.labels is None else _labels(begin.labels))


def parts_of(batch: Any, count: int) -> list[Any]:
    """Its micro-batches. Raises WireError where it has too few rows."""
    try:
        return split(batch, count)
    except ValueError as error:
        raise WireError(str(error)) from None


def samples_of(ids: tuple[int, ...], parts: list[int]) -> list[tuple[int, ...]]:
    """The ids of each micro-batch's samples. Raises WireError for too many or too few."""
    if not ids:
        return [()] * len(parts)
    if len(ids) != sum(parts):
        raise WireError(f"{len(ids)} sample ids came for {sum(parts)} samples")
    found, at = [], 0
    for count in parts:
        found.append(tuple(ids[at : at + count]))
        at += count
    return found


def _labels(said: Any) -> torch.Tensor:
    try:
        return torch.tensor(said)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WireError(f"{LABELS} are no tensor: {str(error)[:100]}") from None
