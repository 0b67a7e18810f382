"""What one end of a link remembers of every sample: a row, and a checksum that says which row."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merak_like.runtime.codecs.wire import Layout, as_bytes, layout_of

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Kept(NamedTuple):
    """One sample's row and its checksum."""

    row: Tensor
    tag: int


class Memory:
    """Rows by sample id on the host, ``capacity`` bytes of them; beyond that the least recently used go between steps.

    Within a step none goes, so what is known at its beginning does not depend on when its micro-batches come. Two
    memories that are put the same rows in the same steps hold the same rows.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._step: int | None = None
        self._recent: dict[int, tuple[int, int]] = {}
        """What the running step put: which micro-batch, and which of its rows."""
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def tag(self, sample: int, row: Layout) -> int | None:
        """The checksum of the sample's row; None where there is no row of that layout."""
        kept = self._kept.get(sample)
        return kept.tag if kept is not None and layout_of(kept.row) == row else None

    def rows(self, samples: Sequence[int], like: Layout, device: torch.device) -> Tensor:
        """The rows of samples that are known, one under the other."""
        rows = [self._kept[sample].row for sample in samples]
        if not rows:
            return torch.empty((0, *like.shape), dtype=like.dtype, device=device)
        return torch.stack(rows).to(device)

    def begin(self, step: int) -> None:
        """A step is under way; where it is another than before, drop what is too much."""
        if step == self._step:
            return
        self._arrange()
        self._step, self._recent = step, {}
        if self.nbytes > self.capacity:
            warnings.warn(
                f"samples take more than the {self.capacity} bytes of a codec's memory: those used longest ago are "
                "forgotten and sent whole again; capacity= of the codec gives it more",
                stacklevel=2,
            )
        while self.nbytes > self.capacity:
            _, kept = self._kept.popitem(last=False)
            self.nbytes -= kept.row.nbytes

    def put(self, samples: Sequence[int], rows: Tensor, tags: Sequence[int], micro_batch: int = 0) -> None:
        """Remember rows; what is not finite is forgotten instead."""
        good = rows.isfinite().flatten(1).all(1).tolist()
        self.forget(samples)
        for at, (sample, row, tag, finite) in enumerate(zip(samples, rows.cpu().unbind(), tags, good, strict=True)):
            if finite:
                # A row of its own: one that stays would otherwise hold its whole batch.
                self._kept[sample] = Kept(row.clone(), tag)
                self._recent[sample] = micro_batch, at
                self.nbytes += row.nbytes

    def _arrange(self) -> None:
        """Order what the step used by its micro-batches: the two ends may have come to them in another order."""
        for sample in sorted(self._recent, key=self._recent.__getitem__):
            self._kept.move_to_end(sample)

    def forget(self, samples: Collection[int] | None = None) -> None:
        """Forget these samples, or all."""
        for sample in list(self._kept) if samples is None else samples:
            if (kept := self._kept.pop(sample, None)) is not None:
                self.nbytes -= kept.row.nbytes
                self._recent.pop(sample, None)

    def state_dict(self) -> dict[str, Tensor]:
        """``order``: all ids, least recently used first; per layout, ``n.samples`` and their rows in ``n.rows``."""
        self._arrange()
        state = {"order": torch.tensor(list(self._kept), dtype=torch.int64)}
        groups: dict[Layout, list[int]] = {}
        for sample, kept in self._kept.items():
            groups.setdefault(layout_of(kept.row), []).append(sample)
        for i, group in enumerate(groups.values()):
            state[f"{i}.samples"] = torch.tensor(group, dtype=torch.int64)
            state[f"{i}.rows"] = torch.stack([self._kept[sample].row for sample in group])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Hold exactly what ``state_dict`` held. Raises ValueError where it does not fit together."""
        found: dict[int, Kept] = {}
        groups = {name.partition(".")[0] for name in state if name != "order"}
        wanted = {"order", *(f"{i}.{part}" for i in groups for part in ("samples", "rows"))}
        if wanted != set(state):
            raise ValueError(f"the state of a memory has {', '.join(sorted(wanted))}, found {', '.join(sorted(state))}")
        for i in groups:
            samples, rows = state[f"{i}.samples"].tolist(), state[f"{i}.rows"].cpu()
            if len(samples) != len(rows):
                raise ValueError(f"the state of a memory has {len(rows)} rows for {len(samples)} samples")
            for sample, row, tag in zip(samples, rows.unbind(), fingerprints(rows, samples), strict=True):
                found[sample] = Kept(row.clone(), tag)
        order = state["order"].tolist()
        if sorted(order) != sorted(found):
            raise ValueError(f"the state of a memory orders {len(order)} samples and has rows of {len(found)}")
        self._kept = OrderedDict((sample, found[sample]) for sample in order)
        self._step, self._recent = None, {}
        self.nbytes = sum(kept.row.nbytes for kept in self._kept.values())


def fingerprints(rows: Tensor, samples: Sequence[int]) -> list[int]:
    """A checksum of 32 bits for each row and its sample's id.

    A sum of 64-bit words times fixed odd weights modulo 2**64, high half (multilinear hashing: Lemire and Kaser 2014,
    "Strongly universal string hashing is fast", sec. 3): whole numbers add up the same in any order, so the checksum
    is the same on every device, and it is computed where the rows are. It finds accidents, not forgeries.
    """
    data = as_bytes(rows).view(len(samples), -1) if rows.numel() else rows.new_zeros(len(samples), 0, dtype=torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % 8))
    words = data.contiguous().view(torch.int64) if data.numel() else data.to(torch.int64)
    weights = _mixed(torch.arange(1, words.shape[1] + 1, device=rows.device)) | 1
    ids = torch.tensor(list(samples), dtype=torch.int64, device=rows.device)
    sums = _mixed((words * weights).sum(1) + _mixed(ids))
    return (sums >> 32 & 0xFFFFFFFF).tolist()


def _mixed(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) on int64, with arithmetic shifts."""
    x = x * _signed(_GOLDEN)
    x = (x ^ x >> 30) * _signed(_MIX1)
    x = (x ^ x >> 27) * _signed(_MIX2)
    return x ^ x >> 31


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)
