"""Several documents in one row, none of which sees another.

    ids         a a a b b c c c       labels      - a a - b - c c      ``-``: the first token of a document is nobody's
    positions   0 1 2 0 1 0 1 2                                        prediction, so no loss counts it
    attention   block diagonal: a token sees the earlier tokens of its own document

New positions alone do not separate documents: without the mask a token attends to all that is before it in the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like.trainer.data.collate import IGNORED


def separated(ids: Tensor, document: Tensor, causal: bool = True) -> dict[str, Tensor]:
    """A batch in which documents do not see each other. ``ids`` and ``document`` are [rows, tokens].

    ``document`` numbers the documents of a row from 0 on; tokens of -1 are filling. ``attention_mask`` is additive,
    [rows, 1, tokens, tokens], float32: 0 where a token looks, the lowest number where it must not. A filling token
    sees itself alone, since a row of softmax needs something to see.
    """
    rows, tokens = ids.shape
    where = torch.arange(tokens).expand(rows, tokens)
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    filling = document < 0
    start = torch.where(first, where, 0).cummax(1).values
    seen = (document[:, :, None] == document[:, None, :]) & ~filling[:, :, None]
    if causal:
        seen &= where[:, :, None] >= where[:, None, :]
    seen |= torch.eye(tokens, dtype=torch.bool)
    mask = torch.zeros(rows, 1, tokens, tokens).masked_fill_(~seen[:, None], torch.finfo(torch.float32).min)
    labels = ids.masked_fill(filling | (first if causal else torch.zeros_like(first)), IGNORED)
    return {"input_ids": ids, "position_ids": where - start, "attention_mask": mask, "labels": labels}


def documents_of(ids: Tensor, end: int) -> Tensor:
    """Number the documents of each row: one ends with each token ``end``."""
    ends = (ids == end).long()
    return ends.cumsum(1) - ends


def fill_rows(lengths: Sequence[int], width: int) -> list[list[tuple[int, int, int]]]:
    """Pack documents into rows of at most ``width`` tokens: for each row (document, first token, stop) pieces.

    First fit over a window of open rows, in the order given. A document longer than a row is cut into pieces that are
    documents of their own.
    """
    rows: list[list[tuple[int, int, int]]] = []
    free: dict[int, int] = {}
    for number, length in enumerate(lengths):
        for start in range(0, length, width):
            stop = min(length, start + width)
            fits = next((row for row, left in free.items() if left >= stop - start), None)
            if fits is None:
                fits = len(rows)
                rows.append([])
                free[fits] = width
            rows[fits].append((number, start, stop))
            free[fits] -= stop - start
            if not free[fits]:
                del free[fits]
            elif len(free) > WINDOW:
                del free[next(iter(free))]
    return rows


WINDOW = 64
"""Rows that stay open for a document that fits: packing is then linear in the number of documents."""


def joined(pieces: Sequence[Tensor], width: int, token: int) -> tuple[Tensor, Tensor]:
    """A row of pieces, filled up: its ids and the documents they belong to."""
    ids = torch.full((width,), token, dtype=torch.long)
    document = torch.full((width,), -1, dtype=torch.long)
    at = 0
    for number, piece in enumerate(pieces):
        ids[at : at + len(piece)], document[at : at + len(piece)] = piece, number
        at += len(piece)
    return ids, document


@dataclass(frozen=True)
class PaddingFree:
    """Samples of any length, laid end to end into ``rows`` rows of about the same length.

    ``rows`` should be the micro-batches of a step over all replicas, or a multiple. Longest samples are placed first,
    each into the shortest row; what is filled up is the difference of the rows, not of the samples. For causal models
    that take ``position_ids`` and a mask of four dimensions, which those of transformers do.
    """

    rows: int
    token: int = 0
    multiple: int = 1
    """Lengths of rows are rounded up to a multiple of it: fewer shapes, so fewer traces."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch. Labels of the samples, where they have them, are kept."""
        if len(samples) < self.rows:
            raise ValueError(f"{len(samples)} samples do not fill {self.rows} rows: use fewer rows or a larger batch")
        placed: list[list[int]] = [[] for _ in range(self.rows)]
        filled = [0] * self.rows
        sizes = [len(sample["input_ids"]) for sample in samples]
        for number in sorted(range(len(samples)), key=lambda i: (-sizes[i], i)):
            row = filled.index(min(filled))
            placed[row].append(number)
            filled[row] += sizes[number]
        width = -(-max(filled) // self.multiple) * self.multiple
        rows = [joined([torch.as_tensor(samples[i]["input_ids"]) for i in row], width, self.token) for row in placed]
        batch = separated(torch.stack([ids for ids, _ in rows]), torch.stack([document for _, document in rows]))
        if "labels" in samples[0]:
            for row, into in zip(placed, batch["labels"], strict=True):
                given = torch.cat([torch.as_tensor(samples[i]["labels"]) for i in row])
                keep = into[: len(given)] != IGNORED
                into[: len(given)][keep] = given[keep]
        return batch
