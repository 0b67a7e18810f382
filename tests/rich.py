"""Plans with several stages per rank, recompute and split backwards, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from merak_like import Mesh, Plan, make_plan, trace
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.plan import Unit
from merak_like.partitioner.planned import named_schedule
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.action import Schedule
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.schedules.v_shape import v_stage_rank
from merak_like.partitioner.simulator import Costs, StageCosts
from merak_like.runtime.batches import rows, split
from tests.training import Subject

SCHEDULES = (*AS_DATA, AUTO, AUTO_V)
RECOMPUTE: dict[str, Callable[[int, Unit], bool]] = {
    "none": lambda place, unit: False,
    "full": lambda place, unit: True,
    "part": lambda place, unit: place % 3 != 1,
}
"""Which of a stage's units are computed again, by their place in it."""


def rich_plan(
    one: Subject, example: Any, dp: int, ranks: int, micro_batches: int, schedule: str, recompute: str, chunks: int = 2,
    hardware: Hardware | str = "a100-80gb",
) -> Plan:  # fmt: skip
    """A plan of these ranks for any schedule; equal stages as far as the model has them."""
    traced = trace(one.model, split(example, dp * micro_batches)[0], one.loss_fn)
    order = built(schedule, ranks, micro_batches, chunks, recompute)
    batch = -(-rows(example) // (dp * micro_batches)) * dp * micro_batches
    base = make_plan(
        traced.graph, Mesh(dp, order.stages), hardware=hardware, batch=batch, micro_batches=micro_batches,
        schedule="1f1b",
    )  # fmt: skip
    chosen = RECOMPUTE[recompute]
    stages = tuple(
        replace(
            stage,
            rank=order.stage_rank[stage.index],
            recompute=tuple(
                unit.name
                for place, unit in enumerate(u for u in base.units if u.stage == stage.index)
                if chosen(place, unit)
            ),
        )
        for stage in base.stages
    )
    orders = tuple(" ".join(map(str, actions)) for actions in order.orders) if schedule in (AUTO, AUTO_V) else ()
    return replace(base, mesh=Mesh(dp, ranks), schedule=schedule, orders=orders, stages=stages)


def built(schedule: str, ranks: int, micro_batches: int, chunks: int, recompute: str) -> Schedule:
    """The schedule of a name; the automatic ones for stages that are not equal, so that their orders are their own."""
    if schedule not in (AUTO, AUTO_V):
        return named_schedule(schedule, ranks, micro_batches, chunks)
    stage_rank = tuple(range(ranks)) if schedule == AUTO else v_stage_rank(ranks)
    again = float(recompute != "none")
    costs = Costs(tuple(StageCosts(1 + 0.3 * (s % 2), 1, again, 1) for s in range(len(stage_rank))))
    return auto(costs, micro_batches, stage_rank=stage_rank, effort=0.1).schedule
