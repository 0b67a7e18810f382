"""In which order each side's stages compute in a step; a host's half may be on several ranks.

edge            head ─► Leaves         Arrives ─► tail
host, 2 ranks   Arrives ─► part 1      Leaves            rank 0
                           └► part 2 ──┘                 rank 1

Micro-batches are dealt out: of two replicas the first has 0, 2, ..., the second 1, 3, ..., so that both are at work
however few are under way.
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


def dealt(micro_batches: int, replica: int, replicas: int) -> range:
    """The micro-batches of a step that one replica runs."""
    return range(replica, micro_batches, replicas)


def orders(
    side: Side, cut: Cut, micro_batches: int, window: int, ranks: int = 1, replicas: int = 1
) -> tuple[str, ...]:  # fmt: skip
    """Each rank's computations in a step: ``window`` micro-batches are on their way before the first comes back.

    Of a host with ``replicas`` these are one's, which counts its own micro-batches.
    """
    first = min(window, micro_batches)
    if side == "edge":
        return (_edge(cut, micro_batches, first),)
    own, first = micro_batches // replicas, -(-first // replicas)
    late = 1 if ranks > 1 and replicas == 1 else 0  # the next one's gradient may hang on this one's
    return (_first(cut, own, first, ranks, late), *(_other(at, own, first) for at in range(2, ranks + 1)))


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


def _first(cut: Cut, micro_batches: int, first: int, ranks: int, late_back: int) -> str:
    """A host's rank 0. It asks the last rank for results while that one is at work on the micro-batches after.

    Its own backward of a micro-batch it can put off by one and no more: the edge waits for that gradient.
    """
    leaves = ranks + 1 if cut.back is not None else None
    late = min(ranks - 1, first - 1)
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
