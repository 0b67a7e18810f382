"""The machine of ``here.py`` as a short profile finds it: of each row's blocks, and of messages between processes.

A row's *shortened* rows have few of its blocks, whatever the row has, in one stage: one and three without tensor
parallelism, so that a block is told from the rest, and two with the row's. ``calibrate`` is fed with their profiles, so
its constants are those of the row's blocks on this machine. Nothing is known here of how long a row takes.

Cores that are all busy share caches and memory, so as many processes as there are cores step together in the first two;
in the other as many as the row has, and if they share cores their seconds are told as if each had its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import ceil, log2
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.planner.random_rows import Row
from merak_like import Engine, Plan
from merak_like.partitioner.explain.calibration import FITTED, READ, SUMS, calibrate
from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.recorded import Record, Recorded

ALONE, PARTED = (1, 3), 2
"""Blocks of shortened models, without and with tensor parallelism."""
STEPS, KEPT = 6, 3
"""Steps that are profiled, and the quickest of them, which count, as of the rows."""
PIPE = Row("gpt2", 4, 128, 1, 2, 1, "1f1b", 4, 1)
"""Tells what a message costs its sender and its receiver."""
SIZES = (2**10, 2**16, 2**20, 2**23)
"""Bytes of the messages and sums that are timed."""


def shortened(row: Row) -> list[Row]:
    """What is profiled for a row. Gradients of a second micro-batch are added up, of the first one not; a backward that
    is split runs other code."""
    split = "zb-h1" if row.schedule.startswith("zb-") else "1f1b"
    short = replace(row, dp=1, pp=1, tp=1, schedule=split, micro_batches=min(row.micro_batches, 3))
    alone = [replace(short, layers=depth) for depth in ALONE]
    parted = replace(short, layers=PARTED, dp=row.ranks // row.tp, tp=row.tp)
    return [*alone, parted] if row.tp > 1 else alone


def profile_of(engine: Engine, batch: Mapping[str, torch.Tensor], meet: Callable[[], None]) -> dict[str, Any]:
    """The engine's plan and its profile; nothing but on rank 0. ``meet`` waits for who steps beside it."""
    engine.step(batch)
    with engine.profile() as profile:
        for _ in range(STEPS):
            meet()
            engine.step(batch)
    engine.close()
    recorded = profile.recorded
    if recorded is None:
        return {}
    quick = sorted(range(STEPS), key=lambda i: recorded.step(i).seconds)[:KEPT][::-1]  # the first one is left out
    steps, tails = (tuple(recorded.steps[i] for i in quick), tuple(recorded.tails[i] for i in quick))
    kept = Recorded(recorded.plan, steps, tails)
    return {"plan": json.loads(engine.plan.to_json()), "profile": json.loads(kept.to_json())}


def company(port: int, index: int, processes: int) -> Callable[[], None]:
    """What lets processes of a machine that are no job begin something together."""
    store: Any = dist.TCPStore("127.0.0.1", port, processes, index == 0)  # pyright: ignore[reportPrivateImportUsage]
    turns = count()

    def meet() -> None:
        key = str(next(turns))
        store.add(key, 1)
        while store.add(key, 0) < processes:
            time.sleep(1e-4)

    return meet


def lines() -> dict[str, list[float]]:
    """In each process of a job: median seconds of messages from rank 0 to 1 and back, halved, and of sums over all."""

    def there_and_back(message: torch.Tensor) -> None:
        for sender in (0, 1):
            if dist.get_rank() in (0, 1):
                (dist.send if dist.get_rank() == sender else dist.recv)(message, 1 - dist.get_rank())

    return {"messages": [each / 2 for each in _timed(there_and_back)], "sums": _timed(dist.all_reduce)}


def _timed(run: Callable[[torch.Tensor], object]) -> list[float]:
    times = list[float]()
    for size in SIZES:
        message, spent = torch.zeros(size // 4), list[float]()
        for _ in range(16):
            dist.barrier()
            begin = time.perf_counter()
            run(message)
            spent.append(time.perf_counter() - begin)
        times.append(median(spent[1:]))
    return times


def joined(rough: Hardware, known: Mapping[str, Mapping[str, list[float]]], ranks: int, cores: int) -> Hardware:
    """The machine with what was timed: latencies are those of the smallest, bandwidths come from the largest.

    A step has one sum of few numbers over all ranks, and is timed between two barriers, which are another.
    """
    messages, sums = known["2"]["messages"], known[str(max(ranks, 2))]["sums"]
    ranks = max(ranks, 2)
    line = Link(_slope(messages), messages[0])
    own = min(cores / ranks, 1.0)
    share = 2 * (ranks - 1) / ranks * _slope(sums) / own / line.bandwidth
    call = max(own * sums[0] - 2 * ceil(log2(ranks)) * line.latency, 0.0)
    each = 2 * own * sums[0]
    return replace(rough, intra=line, intra_efficiency=share, collective_seconds=call, step_seconds=each)


def _slope(times: list[float]) -> float:
    """Bytes per second."""
    return (SIZES[-1] - SIZES[1]) / max(times[-1] - times[1], 1e-9)


def calibrated(shorts: Sequence[Row], profiles: Mapping[str, Any], machine: Hardware, cores: int) -> Hardware:
    """The machine as the profiles of some shortened rows have it."""
    found = calibrate([_pair(profiles[row.name], machine, min(cores / row.ranks, 1.0)) for row in shorts])
    before, after = found.error
    print(f"{shorts[-1].name}: off by {before:.1%} in the mean before, {after:.1%} calibrated", flush=True)
    return found.hardware


def constants(machine: Hardware) -> dict[str, float]:
    """What the profiles say, for the record."""
    return {name: float(f"{getattr(machine, name):.4g}") for name in (*FITTED, *SUMS, *READ)}


def _pair(told: Mapping[str, Any], machine: Hardware, own: float) -> tuple[Plan, Recorded]:
    plan = Plan.from_json(json.dumps(told["plan"]))
    assert plan.basis is not None
    plan = replace(plan, basis=plan.basis.remembering(plan.basis.source, hardware=machine))
    recorded = Recorded.from_json(json.dumps(told["profile"]))
    steps = tuple(
        tuple(tuple(Record(r.action, own * r.start, own * r.end, own * r.waited) for r in rank) for rank in step)
        for step in recorded.steps
    )
    return plan, Recorded(recorded.plan, steps, tuple(tuple(own * tail for tail in step) for step in recorded.tails))
