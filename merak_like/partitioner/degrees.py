"""All choices at once: degrees, micro-batch, schedule, recompute, ZeRO and sequence form, ranked by the step.

::

    every layout of the world ──► estimate (milliseconds each) ──► the best few by the whole planner ──► ranked list
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from merak_like.partitioner.estimate import Tables, estimate
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.layouts import Layout, Wanted, layouts
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import ADAMW, StateBytes

JUDGED = 3
"""Layouts that the whole planner looks at, when nobody says."""
SLACK = 0.97
"""Share of the memory that an estimate may fill."""


@dataclass(frozen=True)
class Ranked:
    """A layout with what is estimated of it, and its plan if the whole planner looked at it."""

    layout: Layout
    step_seconds: float
    rank_bytes: int
    """Of the fullest rank."""
    plan: Plan | None = None


def choose(
    sources: Sources, wanted: Wanted, hardware: Hardware, software: Software, *, states: StateBytes = ADAMW,
    judged: int = JUDGED, listed: int = 12,
) -> list[Ranked]:  # fmt: skip
    """The best layouts: first the one whose plan is fastest, then others, some of which are estimated only.

    Raises ValueError where no layout is possible, or none fits the memory.
    """
    limit = hardware.memory_limit if wanted.memory_limit is None else wanted.memory_limit
    tables = Tables(sources, hardware, software)
    found = [
        Ranked(layout, *estimate(layout, tables, hardware, states, wanted.coding))
        for layout in layouts(sources, wanted, hardware)
    ]
    if not found:
        raise ValueError(_nothing(sources, wanted))
    fitting = sorted((r for r in found if r.rank_bytes <= limit * SLACK), key=lambda r: r.step_seconds)
    if not fitting:
        least = min(found, key=lambda r: r.rank_bytes)
        raise ValueError(
            f"no layout of {wanted.world} devices fits their memory: of {len(found)} the emptiest, {least.layout.mesh} "
            f"with micro-batches of {least.layout.micro_batch}, takes about {least.rank_bytes / 1e9:.1f} GB of "
            f"{limit / 1e9:.1f} GB: use devices of {least.rank_bytes / SLACK / 1e9:.1f} GB for a rank, or more of them"
        )
    planned: list[Ranked] = []
    rest = list[Ranked]()
    for ranked in fitting:
        plan = _plan(ranked.layout, sources, wanted, hardware, software, states) if len(planned) < judged else None
        if plan is None:
            rest.append(ranked)
        else:
            planned.append(replace(ranked, step_seconds=plan.step_seconds, rank_bytes=max(plan.rank_bytes), plan=plan))
        if len(planned) >= judged and len(rest) + len(planned) >= listed:
            break
    planned.sort(key=lambda r: r.step_seconds)
    if planned and (best := _plan(planned[0].layout, sources, wanted, hardware, software, states, True)) is not None:
        planned[0] = replace(planned[0], step_seconds=best.step_seconds, rank_bytes=max(best.rank_bytes), plan=best)
    others = sorted([*planned[1:], *rest], key=lambda r: r.step_seconds)
    return [*planned[:1], *others][:listed]


def _plan(
    layout: Layout, sources: Sources, wanted: Wanted, hardware: Hardware, software: Software, states: StateBytes,
    thorough: bool = False,
) -> Plan | None:  # fmt: skip
    selective = layout.recompute == "selective"
    try:
        return make_plan(
            sources.base(layout.mesh.tp), layout.mesh, hardware=hardware, batch=wanted.batch,
            micro_batch=layout.micro_batch, schedule=layout.schedule,
            chunks=layout.chunks if layout.schedule == "interleaved" else None,
            recompute="none" if selective else layout.recompute, memory_limit=wanted.memory_limit, states=states,
            zero=layout.zero, sequence_parallel=layout.sequence_parallel, sources=sources,
            software=replace(software, selective=selective), thorough=thorough,
            coding=wanted.coding,
        )  # fmt: skip
    except ValueError:  # it does not fit after all, or cannot be cut as finely
        return None


def _nothing(sources: Sources, wanted: Wanted) -> str:
    given = {name: getattr(wanted, name) for name in ("dp", "pp", "tp", "micro_batch", "micro_batches")}
    told = ", ".join(f"{name} = {degree}" for name, degree in given.items() if degree is not None) or "any degrees"
    return (
        f"no layout of {sources.graph.model} on {wanted.world} devices with {told} divides the batch of {wanted.batch} "
        f"samples: dp * pp * tp must be {wanted.world}, and dp times the micro-batch must divide {wanted.batch}; "
        f"use a batch of {max(wanted.batch // wanted.world, 1) * wanted.world}"
    )
