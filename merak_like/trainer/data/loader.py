"""Batches by position, and the next ones made ahead by a thread while the step runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any, Protocol

from merak_like.trainer.data.collate import Collate
from merak_like.trainer.data.order import Order


class Samples(Protocol):
    """What can be trained on: a list, a torch or Hugging Face dataset, a token file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Columns:
    """Samples that are mappings, with a few of their fields."""

    samples: Samples
    names: frozenset[str]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {name: sample[name] for name in sample if name in self.names}


@dataclass(frozen=True)
class Share:
    """Which part of a batch this rank reads: rows of one replica, or all; some of its values, none, or all."""

    number: int = 0
    of: int = 1
    names: frozenset[str] | None = None
    """The values; None: all."""
    numbered: bool = False
    """Whether steps are told which samples the rows are."""

    def samples(self, samples: Any) -> Any:
        """The samples with what this rank reads of each. A dataset that can leave out columns does (``datasets``)."""
        if not self.names:
            return samples
        some = getattr(samples, "select_columns", None)
        return Columns(samples, self.names) if some is None else some(sorted(self.names))

    @property
    def whole(self) -> bool:
        """Whether this rank's rows are all."""
        return self.of == 1

    @property
    def nothing(self) -> bool:
        """Whether this rank reads nothing."""
        return self.names is not None and not self.names

    def rows(self, batch: int) -> tuple[int, int]:
        """The first row and the stop."""
        return batch * self.number // self.of, batch * (self.number + 1) // self.of


@dataclass(frozen=True)
class Loader:
    """Batches of ``batch`` samples; the one at a position is always the same."""

    samples: Samples
    collate: Collate
    order: Order
    batch: int
    share: Share = Share()
    own: Any = field(init=False, repr=False, compare=False)
    """The samples, as this rank reads them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", self.share.samples(self.samples))

    def at(self, position: int) -> Any:
        """The batch (or this rank's share of it) that starts at a position; None where this rank reads nothing."""
        if self.share.nothing:
            return None
        start, stop = self.share.rows(self.batch)
        return self.collate([self.own[i] for i in self.order.at(position + start, stop - start)])

    def about(self, position: int) -> dict[str, Any]:
        """What ``engine.step`` must know of the batch at a position: whether the rows are all, and whose they are."""
        start, stop = self.share.rows(self.batch)
        samples = self.order.at(position + start, stop - start) if self.share.numbered else None
        return {"batch_is_global": self.share.whole, "samples": samples}

    def told(self, position: int) -> str:
        """Which samples the whole batch at a position is made of, in words."""
        samples = self.order.at(position, self.batch)
        return f"samples {samples[:16]}{' ...' if len(samples) > 16 else ''}"

    def ahead(self, position: int, stop: int, many: int = 2) -> Iterator[Any]:
        """Batches from a position on up to ``stop``, ``many`` of them made ahead. Close the iterator to end early."""
        made: Queue[tuple[bool, Any]] = Queue(many)
        ended = threading.Event()
        work = threading.Thread(target=self._make, args=(range(position, stop, self.batch), made, ended), daemon=True)
        work.start()
        try:
            for _ in range(position, stop, self.batch):
                good, item = self._next(made, work)
                if not good:
                    raise item
                yield item
        finally:
            ended.set()
            work.join()

    def _make(self, positions: range, made: Queue[tuple[bool, Any]], ended: threading.Event) -> None:
        for position in positions:
            try:
                item = (True, self.at(position))
            except Exception as error:  # it belongs to whoever asks for this batch
                item = (False, error)
            while not ended.is_set():
                try:
                    made.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if ended.is_set() or not item[0]:
                return

    @staticmethod
    def _next(made: Queue[tuple[bool, Any]], work: threading.Thread) -> tuple[bool, Any]:
        while True:
            try:
                return made.get(timeout=1.0)
            except Empty:
                if not work.is_alive() and made.empty():
                    raise RuntimeError("the thread that makes batches ended without one") from None
