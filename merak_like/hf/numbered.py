"""Batches of transformers' loop that say which samples they are made of, for codecs that remember samples.

data[7], data[4] --collate--> {"input_ids": ...}    with numbers: the same and {NUMBERS: [7, 4]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

NUMBERS = "merak_like_sample_numbers"
"""The value of a batch that has them."""


class Numbered(Dataset[tuple[int, Any]]):
    """Samples with their positions in the data."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self.data[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Many at once, where the data can give them so."""
        many = getattr(self.data, "__getitems__", None)
        items = [self.data[index] for index in indices] if many is None else many(indices)
        return [*zip(map(int, indices), items, strict=True)]


@dataclass(frozen=True)
class Numbering:
    """A collate function for samples with positions, which it adds to the batch."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """The batch."""
        batch: Mapping[str, Any] = self.collate([item for _, item in items])
        return {**batch, NUMBERS: torch.tensor([number for number, _ in items])}


@contextmanager
def numbered(trainer: Any, asked: Mapping[str, Any], wanted: bool) -> Iterator[Mapping[str, Any]]:
    """What ``_get_dataloader`` of a trainer is asked for, and inside, if it trains and it is wanted, with numbers.

    Raises ValueError for data that is only run through, in which a sample has no position.
    """
    if not wanted or not asked.get("is_training", False):
        yield asked
        return
    data, sampler, before = asked["dataset"], asked.get("sampler_fn"), trainer.data_collator
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"a codec that remembers samples needs their positions, which {type(data).__name__} has not: give a data "
            "set with a length and samples by number, or use a codec without memory"
        )
    trainer.data_collator = Numbering(trainer._get_collator_with_removed_columns(before, asked.get("description")))
    chosen = None if sampler is None else lambda own: sampler(own.data)
    try:
        yield {**asked, "dataset": Numbered(data), "sampler_fn": chosen}
    finally:
        trainer.data_collator = before
