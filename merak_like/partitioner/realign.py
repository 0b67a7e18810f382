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
    starts = plan.starts
    before, after = ([(op.kind, op.target, op.scope) for op in graph.ops] for graph in (planned, traced))
    if before != after:
        starts = _moved(starts, before, after)
        legal = find_cuts(traced).legal
        starts = (0, *(_nearest(start, legal.tolist()) for start in starts[1:-1]), len(after))
    _check(plan, traced, starts)
    return starts


def _moved(starts: Sequence[int], before: Sequence[object], after: Sequence[object]) -> tuple[int, ...]:
    place = {len(before): len(after)}
    for block in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        place.update((block.a + i, block.b + i) for i in range(block.size))
    for old in range(len(before) - 1, -1, -1):
        place.setdefault(old, place[old + 1])
    return tuple(place[start] for start in starts)


def _nearest(start: int, legal: Sequence[bool]) -> int:
    options = [i for i, fits in enumerate(legal) if fits]
    return min(options, key=lambda i: (abs(i - start), i), default=start)


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
