"""Samples become a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Collate = Callable[[list[Any]], Any]
"""From samples to a batch as ``engine.step`` takes it."""

IGNORED = -100
"""The label that no loss counts."""


def stack(samples: list[Any]) -> Any:
    """Samples of one shape, one above the other: dicts and tuples by field, numbers and tensors as rows.

    Raises ValueError, naming the field and the shapes, where they differ: pad them with ``Pad``.
    """
    return _stacked(samples, "")


def _stacked(items: Sequence[Any], where: str) -> Any:
    first = items[0]
    if isinstance(first, Mapping):
        return {key: _stacked([item[key] for item in items], f"{where}[{key!r}]") for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(fields, f"{where}[{i}]") for i, fields in enumerate(zip(*items, strict=True)))
    rows = [torch.as_tensor(item) for item in items]
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) > 1:
        raise ValueError(
            f"sample{where} has the shapes {shapes[0]} and {shapes[-1]}, which do not stack: use Pad(tokenizer's pad "
            "token), PaddingFree, or a collate function of your own"
        )
    return torch.stack(rows)


@dataclass(frozen=True)
class Pad:
    """Token samples of any length, padded on the right to the longest.

    ``input_ids`` are filled with ``token``, labels of tokens with -100, other sequences (token types) with 0, and
    ``attention_mask`` tells tokens from filling. Single labels stay as they are.
    """

    token: int = 0
    multiple: int = 1
    """Lengths are rounded up to a multiple of it: fewer shapes, so fewer traces."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.multiple) * self.multiple
        fills = {"input_ids": self.token, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        for key in samples[0]:
            rows = [torch.as_tensor(sample[key]) for sample in samples]
            if rows[0].dim() == 0:
                batch[key] = torch.stack(rows)
                continue
            batch[key] = torch.full((len(rows), width), fills.get(key, 0), dtype=rows[0].dtype)
            for row, into in zip(rows, batch[key], strict=True):
                into[: len(row)] = row
        if "attention_mask" not in batch:
            lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return batch
