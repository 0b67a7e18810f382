"""Token files: one long line of token numbers on the disk, of which a run reads only the rows it trains on.

A file is a plain ``.npy`` array of one dimension (uint16 where the vocabulary allows it, else uint32), so numpy alone
can make and read it. Documents end with their ``end`` token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from merak_like.trainer.data.documents import documents_of, fill_rows, joined, separated

BLOCK = 1 << 20


def write_tokens(documents: Iterable[Iterable[int]], path: Path, vocabulary: int) -> int:
    """Write the documents, one after the other, as a token file; how many tokens there are.

    The file appears whole under its name or not at all. Raises ValueError for no tokens, or one outside ``vocabulary``.
    """
    kind = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    raw = path.with_name(f"{path.name}.{os.getpid()}.part")
    total, waiting = 0, list[int]()
    path.parent.mkdir(parents=True, exist_ok=True)
    with raw.open("wb") as file:
        npy.write_array_header_1_0(file, _header(kind, 0))
        for document in documents:
            waiting += document
            if len(waiting) >= BLOCK:
                total += _write(file, waiting, kind, vocabulary)
        total += _write(file, waiting, kind, vocabulary)
        # The header is padded, so one with the true length is as long as the first.
        file.seek(0)
        npy.write_array_header_1_0(file, _header(kind, total))
    if not total:
        raw.unlink()
        raise ValueError(f"there are no tokens to write to {path}")
    raw.rename(path)
    return total


def _header(kind: Any, total: int) -> dict[str, Any]:
    return {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": (total,)}


def _write(file: Any, waiting: list[int], kind: Any, vocabulary: int) -> int:
    if waiting and not (min(waiting) >= 0 and max(waiting) < vocabulary):
        raise ValueError(f"tokens {min(waiting)} to {max(waiting)} do not fit a vocabulary of {vocabulary}")
    file.write(np.asarray(waiting, kind).tobytes())
    count = len(waiting)
    waiting.clear()
    return count


@dataclass(frozen=True)
class TokenFile:
    """Rows of ``width`` tokens of a token file: sample i is the i-th run of them; what does not fill a row is left out.

    With ``end`` documents are kept apart (see ``documents.py``), else a row is one text. Raises ValueError for what is
    no token file, or too short for a row.
    """

    path: Path
    width: int
    end: int | None = None
    uniform: bool = True
    """Every sample has the same shape, so a replica need not see the others' samples."""
    tokens: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            tokens = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{self.path} is not a token file (an .npy array): {error}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(f"{self.path} is not a line of token numbers, but {tokens.dtype} {list(tokens.shape)}")
        if len(tokens) < self.width:
            raise ValueError(f"{self.path} has {len(tokens)} tokens, fewer than one row of {self.width}")
        object.__setattr__(self, "tokens", tokens)

    def __len__(self) -> int:
        return len(self.tokens) // self.width

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.tokens[index * self.width : (index + 1) * self.width]
        return torch.from_numpy(row.astype(np.int64))

    def collate(self, samples: list[Tensor]) -> dict[str, Tensor]:
        """A batch for a causal language model."""
        ids = torch.stack(samples)
        if self.end is None:
            return {"input_ids": ids, "labels": ids}
        return separated(ids, documents_of(ids, self.end))


@dataclass(frozen=True)
class Packed:
    """Documents of any length, packed whole into rows of ``width`` tokens; each is kept apart from its neighbours.

    ``documents[i]`` is a mapping with ``input_ids``, or a sequence of token numbers. Only their lengths are read at the
    start.
    """

    documents: Any
    width: int
    token: int = 0
    """What rows are filled up with; no loss counts it."""
    causal: bool = True
    uniform: bool = True
    rows: list[list[tuple[int, int, int]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths = [len(self._ids(i)) for i in range(len(self.documents))]
        object.__setattr__(self, "rows", fill_rows(lengths, self.width))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pieces = [torch.as_tensor(self._ids(i))[start:stop] for i, start, stop in self.rows[index]]
        return joined(pieces, self.width, self.token)

    def _ids(self, index: int) -> Any:
        document = self.documents[index]
        return document["input_ids"] if isinstance(document, Mapping) else document

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """A batch in which documents do not see each other."""
        ids, document = (torch.stack(list(field)) for field in zip(*samples, strict=True))
        return separated(ids, document, self.causal)


Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token numbers, many at once."""


def encoded(texts: Iterable[str], encode: Encode, end: int | None, many: int = 1000) -> Iterable[list[int]]:
    """The tokens of each text, with the end token behind it."""
    tail = [] if end is None else [end]
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == many:
            yield from ([*ids, *tail] for ids in encode(group))
            group = []
    if group:
        yield from ([*ids, *tail] for ids in encode(group))
