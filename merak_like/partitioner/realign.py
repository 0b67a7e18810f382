"""The same cut on another trace of the same model: other shapes may record other ops, the weights must stay put."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import residents
from merak_like.partitioner.plan import Plan


def realign(plan: Plan, planned: ProxyGraph, traced: ProxyGraph) -> tuple[int, ...]:
    """The stage starts of a plan on another trace, so that every parameter stays on its stage.

    Raises ValueError where the new trace cannot be cut so.
    """
    starts = moved(plan.starts, planned, traced)
    _check(plan, traced, starts)
    return starts


def recomputed_ranges(plan: Plan, stage: int, planned: ProxyGraph, traced: ProxyGraph) -> tuple[tuple[int, int], ...]:
    """The ops ``first <= i < stop`` of each piece that a stage computes again, on another trace; in order and apart.

    Units next to each other are one piece. What the new trace has no ops for is left out.
    Raises ValueError for a unit that the stage does not have.
    """
    again = plan.stages[stage].recompute
    own = {unit.name: (unit.first, unit.stop) for unit in plan.units if unit.stage == stage}
    if missing := sorted(set(again) - set(own)):
        raise ValueError(f"stage {stage} has no units {missing[:5]} to recompute: it has {', '.join(own)}")
    borders = sorted(own[name] for name in again)
    placed = moved([border for unit in borders for border in unit], planned, traced)
    joined: list[tuple[int, int]] = []
    for first, stop in zip(placed[::2], placed[1::2], strict=True):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], stop)
        elif first < stop:
            joined.append((first, stop))
    return tuple(joined)


def moved(positions: Sequence[int], planned: ProxyGraph, traced: ProxyGraph) -> tuple[int, ...]:
    """Cuts of the planned graph on another trace: before the same ops, or at the legal cut nearest to that.

    Positions in order stay in order, equal ones equal; the two ends of the graph are always legal.
    """
    before, after = ([(op.kind, op.target, op.scope) for op in graph.ops] for graph in (planned, traced))
    if before == after:
        return tuple(positions)
    place = {len(before): len(after)}
    for block in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        place.update((block.a + i, block.b + i) for i in range(block.size))
    for old in range(len(before) - 1, -1, -1):
        place.setdefault(old, place[old + 1])
    ends = {0: 0, len(before): len(after)}
    legal = find_cuts(traced).positions.tolist() or list(ends.values())
    return tuple(ends[old] if old in ends else _nearest(place[old], legal) for old in positions)


def _nearest(position: int, legal: Sequence[int]) -> int:
    return min(legal, key=lambda i: (abs(i - position), i))


def _check(plan: Plan, graph: ProxyGraph, starts: Sequence[int]) -> None:
    needs = residents(graph)
    for stage in plan.stages:
        held = {*stage.params, *stage.buffers}
        used = {name for i in range(starts[stage.index], starts[stage.index + 1]) for name in needs[i]}
        if missing := sorted(used - held):
            raise ValueError(
                f"with these input shapes stage {stage.index} would need {missing[:5]}, which the plan put elsewhere: "
                "make the plan with an example of this shape"
            )
