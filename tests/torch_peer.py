"""The schedules of torch.distributed.pipelining beside ours: the same orders, and the same gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.schedules.action import Schedule
from merak_like.partitioner.schedules.grid import from_csv
from merak_like.runtime.batches import rows
from tests.rich import rich_plan
from tests.training import Subject, engine, far

#: Name of torch -> stages per rank.
TORCHS = {
    "GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "LoopedBFS": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}  # fmt: skip
WIDTH, LAYERS, MICRO_BATCHES = 8, 8, 8
SLOW = replace(hardware_named("a100-80gb"), name="slow", memory_bandwidth=1e6, launch_seconds=0.0)
"""Here the layers take longer than the loss, and each gets a stage."""


def torchs(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Torch's order, computed without processes; pairs that it overlaps are taken one after the other."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    table = get_schedule_ops(name, ranks, micro_batches, chunks)

    def cells(actions: Any) -> list[str]:
        flat = [each for action in actions if action is not None for each in (action.sub_actions or (action,))]
        return [str(each) for each in flat]

    return from_csv("".join(",".join(cells(actions)) + "\n" for actions in table))


def loss_of(output: Tensor, target: Any) -> Tensor:
    """Squared distance to the target, a tensor or a batch with one."""
    return (output - (target["y"] if isinstance(target, dict) else target)).square().mean()


class Chain(nn.Module):
    """Equal layers in a row, one for each stage of every schedule here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
        self.layers = nn.Sequential(*pairs).double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layers(x)


def beside_torch(dp: int, pp: int, name: str) -> float:
    """Carry out torch's order in our engine, and let torch carry it out: the largest difference of a gradient."""
    chunks = TORCHS[name]
    generator = torch.Generator().manual_seed(1)
    batch = {k: torch.randn(2 * MICRO_BATCHES, WIDTH, generator=generator, dtype=torch.float64) for k in "xy"}
    one = Subject(Chain(), lambda: batch, loss_of, rows)
    named = name.lower() if chunks == 1 else "interleaved"
    plan = rich_plan(one, batch, dp, pp, MICRO_BATCHES, named, "none", chunks, SLOW)
    if chunks > 1:  # the two with one stage per rank are loops in torch, and no tables
        order = torchs(name, pp, MICRO_BATCHES, chunks)
        orders = tuple(" ".join(map(str, actions)) for actions in order.orders)
        ranked = zip(plan.stages, order.stage_rank, strict=True)
        plan = replace(plan, orders=orders, stages=tuple(replace(s, rank=rank) for s, rank in ranked))
    ours = engine(one, batch, dp, pp, MICRO_BATCHES, plan=plan, max_grad_norm=None)
    ours.step(batch)
    mine = {n: p.grad.clone() for n, p in ours.model.named_parameters() if p.grad is not None}
    firsts = [min(int(n.split(".")[1]) for n in stage.params) for stage in plan.stages]
    ours.close()
    assert mine
    theirs = by_torch(name, plan.stage_rank, firsts, batch)
    assert mine.keys() == theirs.keys()
    return max(far(mine[key], theirs[key]) for key in mine)


def by_torch(name: str, stage_rank: tuple[int, ...], firsts: list[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of this rank's stages, by torch's own runtime."""
    rank, stops = dist.get_rank(), [*firsts[1:], LAYERS]
    model, device = copy.deepcopy(Chain()), torch.device("cpu")
    own = [s for s, on in enumerate(stage_rank) if on == rank]
    stages = [PipelineStage(model.layers[firsts[s] : stops[s]], s, len(firsts), device) for s in own]
    kind = get_schedule_class(name)
    many = issubclass(kind, PipelineScheduleMulti)
    schedule: Any = kind(stages if many else stages[0], MICRO_BATCHES, loss_fn=loss_of)  # type: ignore[arg-type]
    last = len(firsts) - 1 in own
    schedule.step(*([batch["x"]] if 0 in own else []), **({"target": batch["y"]} if last else {}))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
