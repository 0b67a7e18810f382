"""The ``data`` section becomes datasets: read, tokenised once, packed or padded, and split."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merak_like.trainer.config import Data
from merak_like.trainer.data import files
from merak_like.trainer.data.collate import Collate, Pad
from merak_like.trainer.data.loader import Samples
from merak_like.trainer.data.order import Order
from merak_like.trainer.data.tokens import Packed, TokenFile, encoded, write_tokens

if TYPE_CHECKING:
    from merak_like.hf.text import Tokenizer

MULTIPLE = 8
"""Padded lengths are multiples of it: fewer shapes to trace."""


@dataclass(frozen=True)
class Datasets:
    """What a run trains on and looks at."""

    train: Samples
    eval: Samples | None = None
    collate: Collate | None = None
    classes: tuple[str, ...] = ()
    """Of a classifier, in the order of their numbers."""


@dataclass(frozen=True)
class Part:
    """Some of the samples; everything else is as they have it."""

    samples: Any
    indices: Sequence[int]
    uniform: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uniform", getattr(self.samples, "uniform", False))
        if hasattr(self.samples, "collate"):
            object.__setattr__(self, "collate", self.samples.collate)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.samples[self.indices[index]]


@dataclass(frozen=True)
class Documents:
    """Texts in a token file; only those that are asked for are read."""

    tokens: Path
    _all: Any = field(init=False, repr=False, compare=False)
    _ends: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_all", np.load(self.tokens, mmap_mode="r", allow_pickle=False))
        object.__setattr__(self, "_ends", np.load(_ends(self.tokens), mmap_mode="r", allow_pickle=False))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return self._all[start : int(self._ends[index])].astype(np.int64)


def datasets(
    asked: Data, tokenizer: Callable[[], Tokenizer], *, seed: int, cache: Path, lead: bool, timeout: float
) -> Datasets:
    """The datasets of a run. Rank 0 tokenises and the others wait for the file, ``timeout`` seconds at most.

    Raises ValueError for files that are not there or cannot be read, and fields that records do not have.
    """
    assert asked.train is not None
    paths, kind = files.found(asked.train, asked.format)
    others = files.found(asked.eval, asked.format) if asked.eval else None
    if kind == "tokens":
        return _token_files(asked, paths, others, tokenizer, seed)
    if asked.label is not None:
        return _classified(asked, (paths, kind), others, tokenizer(), seed)
    made = [
        _tokenised(asked, *source, tokenizer(), cache=cache, lead=lead, timeout=timeout)
        for source in ((paths, kind), others)
        if source
    ]
    return _language(asked, made, tokenizer(), seed)


def split(samples: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Training and evaluation samples: the same split for the same seed, at least one on each side."""
    total = len(samples)
    few = round(total * share)
    if not 0 < few < total:
        raise ValueError(f"data.eval_share = {share} of {total} samples is {few}: it leaves one side empty")
    chosen = set(Order(total, seed + 1).at(0, few))
    return Part(samples, [i for i in range(total) if i not in chosen]), Part(samples, sorted(chosen))


def _token_files(
    asked: Data, paths: list[Path], others: Any, tokenizer: Callable[[], Tokenizer], seed: int
) -> Datasets:
    if len(paths) > 1 or (others and len(others[0]) > 1):
        raise ValueError(f"{asked.train!r} means {len(paths)} token files: name one")
    end = tokenizer().end if asked.packing == "documents" else None
    train = TokenFile(paths[0], asked.seq, end)
    if others:
        return Datasets(train, TokenFile(others[0][0], asked.seq, end))
    return Datasets(*split(train, asked.eval_share, seed)) if asked.eval_share else Datasets(train)


def _classified(asked: Data, source: Any, others: Any, tokenizer: Tokenizer, seed: int) -> Datasets:
    assert asked.label is not None
    sides = [list(files.records(*one)) for one in (source, others) if one]
    labels = [[files.field(record, asked.label, "data.label") for record in side] for side in sides]
    names = sorted(
        {str(label) for side in labels for label in side}, key=lambda name: (not name.isdigit(), _natural(name))
    )
    numbers = {name: i for i, name in enumerate(names)}
    made: list[Any] = []
    for side, given in zip(sides, labels, strict=True):
        texts = [str(files.field(record, asked.text, "data.text")) for record in side]
        made.append(_Labelled(texts, [numbers[str(label)] for label in given], tokenizer, asked.seq))
    if len(made) == 1 and asked.eval_share:
        made = list(split(made[0], asked.eval_share, seed))
    return Datasets(made[0], made[1] if len(made) > 1 else None, Pad(tokenizer.pad, MULTIPLE), tuple(names))


@dataclass(frozen=True)
class _Labelled:
    """Texts with their classes; a text is tokenised when, and where, a batch needs it."""

    texts: Sequence[str]
    labels: Sequence[int]
    tokenizer: Tokenizer
    most: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.tokenizer.whole([self.texts[index]], self.most)[0], "labels": self.labels[index]}


def _natural(name: str) -> Any:
    return (int(name), "") if name.isdigit() else (0, name)


def _language(asked: Data, made: list[Path], tokenizer: Tokenizer, seed: int) -> Datasets:
    if asked.packing == "stream":
        sides: list[Any] = [TokenFile(path, asked.seq) for path in made]
        if len(sides) == 1 and asked.eval_share:
            sides = list(split(sides[0], asked.eval_share, seed))
        return Datasets(*sides)
    documents: list[Any] = [Documents(path) for path in made]
    if len(documents) == 1 and asked.eval_share:  # whole documents: no sentence is on both sides
        documents = list(split(documents[0], asked.eval_share, seed))
    if asked.packing == "documents":
        packed: list[Any] = [Packed(side, asked.seq, tokenizer.pad) for side in documents]
        return Datasets(*packed)
    return Datasets(*(_Cut(side, asked.seq) for side in documents), collate=Pad(tokenizer.pad, MULTIPLE))


@dataclass(frozen=True)
class _Cut:
    """One document to a sample, cut at so many tokens."""

    documents: Any
    most: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.documents[index][: self.most]
        return {"input_ids": ids, "labels": ids}


def _tokenised(
    asked: Data, paths: list[Path], kind: str, tokenizer: Tokenizer, *, cache: Path, lead: bool, timeout: float
) -> Path:
    """The token file of these texts: made by rank 0 unless it is there, waited for by the others."""
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    what = repr((facts, kind, asked.text, tokenizer.vocabulary, tokenizer.end, tokenizer.inner.name_or_path))
    path = cache / f"tokens-{hashlib.sha256(what.encode()).hexdigest()[:16]}.npy"
    began = time.monotonic()
    while not path.exists():
        if lead:
            _write(asked, paths, kind, tokenizer, path)
        elif time.monotonic() - began > timeout:
            raise TimeoutError(
                f"rank 0 did not finish {path} in {timeout:.0f} s (is the run's folder shared by all ranks?)"
            )
        else:
            time.sleep(0.1)
    return path


def _write(asked: Data, paths: list[Path], kind: str, tokenizer: Tokenizer, path: Path) -> None:
    def texts() -> Any:
        for record in files.records(paths, kind):
            yield str(files.field(record, asked.text, "data.text"))

    def counted() -> Any:
        for document in encoded(texts(), tokenizer.encode, tokenizer.end):
            ends.append((ends[-1] if ends else 0) + len(document))
            yield document
        np.save(_ends(path), np.asarray(ends, np.int64))  # before the tokens appear

    ends: list[int] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tokens(counted(), path, tokenizer.vocabulary)


def _ends(tokens: Path) -> Path:
    return tokens.with_suffix(".ends.npy")


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch taken apart into its samples."""
    count = len(next(iter(batch.values())))
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]
