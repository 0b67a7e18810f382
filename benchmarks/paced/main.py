"""Does a measured step last as long as the simulated one, under every schedule? See README.md.

    python benchmarks/paced/main.py                 4 and 8 processes
    python benchmarks/paced/main.py --ranks 4       only 4; the table keeps what is known of 8

Paced, not computed: every block sleeps for a fixed time. Transfers, orders, recompute and split backwards are real.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import WIDTH, loss_of, model

from merak_like import Mesh, Plan, auto_parallel, make_plan, trace
from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import LADDER
from merak_like.partitioner.simulator import Costs, StageCosts, simulate

UNIT = 0.05
"""Seconds of the forward of a rank's blocks: long beside what an engine costs on a core shared by four processes."""
BLOCKS = 2
"""Per rank: one for each stage where a rank has two."""

SLOW = replace(hardware_named("a100-80gb"), name="slow", memory_bandwidth=1e6, launch_seconds=0.0)
"""Here the blocks' layers take milliseconds, as they will by sleeping: the planner cuts between equal blocks."""


@dataclass(frozen=True)
class Row:
    """One schedule, with or without recompute of all that it lets recompute."""

    schedule: str
    recompute: bool

    @property
    def name(self) -> str:
        return f"{self.schedule}, recompute" if self.recompute else self.schedule


ROWS = (
    *(Row(name, True) for name in ("1f1b", *LADDER, AUTO)),
    *(Row(name, False) for name in (*(n for n in AS_DATA if n not in LADDER), AUTO, AUTO_V)),
)


def planned(row: Row, ranks: int, micro_batches: int) -> tuple[Plan, Costs]:
    """The plan of a row, and what its stages cost when they sleep."""
    graph = trace(model(BLOCKS * ranks, 0.0, 0.0, 0.0), torch.zeros(1, WIDTH), loss_of).graph
    plan = make_plan(
        graph, Mesh(pp=ranks), hardware=SLOW, batch=micro_batches, micro_batches=micro_batches,
        schedule=row.schedule, recompute="full" if row.recompute else "none",
    )  # fmt: skip
    if row.schedule == AUTO:  # as in scp, the last stage keeps what it has: it holds few micro-batches
        plan = replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], recompute=())))
    share = ranks / len(plan.stages)
    counts = [sum(name.endswith(".layer.weight") for name in stage.params) for stage in plan.stages]
    assert {*counts} == {round(BLOCKS * share)}, f"the stages have {counts} blocks"
    time_of = share * UNIT
    costs = Costs(tuple(StageCosts(time_of, time_of, time_of * bool(s.recompute), time_of) for s in plan.stages))
    if plan.orders:  # built for the seconds of a real device: build them for these
        again = [stage.index for stage in plan.stages if stage.recompute]
        limit = simulate(schedule_of(replace(plan, schedule="1f1b", orders=())), costs).peak_live if again else None
        found = auto(costs, micro_batches, stage_rank=plan.stage_rank, recomputes=again, live=limit)
        plan = replace(plan, orders=tuple(" ".join(map(str, order)) for order in found.schedule.orders))
    return plan, costs


def measure(rows: list[Row], micro_batches: int, steps: int) -> list[dict[str, Any]]:
    """Run every row in this job; seconds of a step from all ranks ready to all ranks done."""
    ranks, found = dist.get_world_size(), []
    nap = UNIT / BLOCKS
    for row in rows:
        plan, costs = planned(row, ranks, micro_batches)
        edges = frozenset((c.source, target) for c in plan.crossings for target in c.targets)
        simulated = simulate(add_transfers(schedule_of(plan), edges), costs, edges)
        engine = auto_parallel(
            model(BLOCKS * ranks, nap, nap, nap), pp=ranks, example=torch.zeros(micro_batches, WIDTH),
            loss_fn=loss_of, micro_batches=micro_batches, plan=plan, device="cpu",
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        )  # fmt: skip
        batch, seconds = torch.ones(micro_batches, WIDTH), []
        for _ in range(steps + 1):
            dist.barrier()
            start = time.perf_counter()
            engine.step(batch)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        engine.close()
        found.append({
            "schedule": row.name, "simulated": simulated.makespan, "measured": statistics.median(seconds[1:]),
            "bubble": simulated.bubble,
        })  # fmt: skip
        if dist.get_rank() == 0:
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Start a job for each number of ranks, or be one of its processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rows = [row for row in ROWS if not args.only or row.name in args.only]
        found = measure(rows, 2 * dist.get_world_size(), args.steps)
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()
        return
    tables: dict[str, Any] = json.loads(args.out.read_text())["ranks"] if args.out.exists() else {}
    for ranks in args.ranks:
        part = args.out.with_suffix(f".{ranks}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        more = ["--steps", str(args.steps), "--out", str(part), *(["--only", *args.only] if args.only else [])]
        subprocess.run([*command, __file__, *more], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        tables[str(ranks)] = json.loads(part.read_text())
        part.unlink()
    setting = {
        "seconds of a rank's forward": UNIT, "micro-batches": "2 x ranks", "steps": args.steps,
        "torch": torch.__version__, "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": setting, "ranks": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
