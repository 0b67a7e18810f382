"""In which order each side's stages compute in a step; a host's half may be on several ranks.

edge            head ─► Leaves         Arrives ─► tail
host, 2 ranks   Arrives ─► part 1      Leaves            rank 0
                           └► part 2 ──┘                 rank 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from merak_like.split.cut import Cut

Side = Literal["edge", "host"]


def stage_rank(side: Side, cut: Cut, ranks: int = 1) -> tuple[int, ...]:
    """The rank that runs each stage of a side: who talks to the other side is rank 0."""
    tailed = cut.back is not None
    if side == "edge":
        return (0,) * (4 if tailed else 2)
    return (0, *range(ranks), *([0] if tailed else []))


def orders(side: Side, cut: Cut, micro_batches: int, window: int, ranks: int = 1) -> tuple[str, ...]:
    """Each rank's computations in a step: ``window`` micro-batches are on their way before the first comes back."""
    first = min(window, micro_batches)
    if side == "edge":
        return (_edge(cut, micro_batches, first),)
    return (_first(cut, micro_batches, first, ranks), *(_other(at, micro_batches, first) for at in range(2, ranks + 1)))


def _edge(cut: Cut, micro_batches: int, first: int) -> str:
    """It asks for a micro-batch's gradient one micro-batch later than it could.

    So the way back and the cloud's work are behind its own.
    """
    out, back = _ways(cut)
    words = [f"F{i}.{stage}" for i in range(first) for stage in out[0]]
    for i in range(micro_batches + 1):
        if i < micro_batches:
            words += [f"F{i}.{stage}" for stage in out[1]] + [f"B{i}.{stage}" for stage in back[0]]
            if i + first < micro_batches:
                words += [f"F{i + first}.{stage}" for stage in out[0]]
        if i:
            words += [f"B{i - 1}.{stage}" for stage in back[1]]
    return " ".join(words)


def _ways(cut: Cut) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """The edge's forward stages before and after the other side's turn; backward stages likewise."""
    if cut.back is not None:
        return ((0, 1), (2, 3)), ((3, 2), (1, 0))
    return ((0, 1), ()), ((), (1, 0))


def _first(cut: Cut, micro_batches: int, first: int, ranks: int) -> str:
    """A host's rank 0. It asks the last rank for results while that one is at work on the micro-batches after.

    Its own backward of a micro-batch it can put off by one and no more: the edge waits for that gradient.
    """
    leaves = ranks + 1 if cut.back is not None else None
    late, late_back = min(ranks - 1, first - 1), min(ranks - 1, 1)
    words: list[str] = []

    def out(i: int) -> list[str]:
        return [f"F{i}.{leaves}"] if leaves is not None and 0 <= i < micro_batches else []

    def back(i: int) -> list[str]:
        return [f"B{i}.1", f"B{i}.0"] if 0 <= i < micro_batches else []

    for i in range(first):
        words += [f"F{i}.0", f"F{i}.1", *out(i - late)]
    for i in range(micro_batches):
        words += [f"B{i}.{leaves}"] if leaves is not None else []
        words += back(i - late_back)
        if i + first < micro_batches:
            words += [f"F{i + first}.0", f"F{i + first}.1"]
        words += out(i + first - late)
    return " ".join(words + (back(micro_batches - 1) if late_back else []))


def _other(stage: int, micro_batches: int, first: int) -> str:
    """A host's other ranks, which hear of the edge through rank 0."""
    words = [f"F{i}.{stage}" for i in range(first)]
    for i in range(micro_batches):
        words.append(f"B{i}.{stage}")
        if i + first < micro_batches:
            words.append(f"F{i + first}.{stage}")
    return " ".join(words)
