"""The machine of ``here.py`` as a short profile finds it: of each row's blocks, and of messages between processes.

A row's *shortened* rows have few of its blocks, whatever the row has, in one stage: one and three without tensor
parallelism, so that a block is told from the rest, and two with the row's. ``calibrate`` is fed with their profiles, so
its constants are those of the row's blocks on this machine. Nothing is known here of how long a row takes.

Cores that are all busy share caches and memory, and processes that take turns on a core find it filled with another's
data. So as many processes step together as the row has ranks, and at least one for each core. If they share cores their
seconds are told as if each had its own: those of a process without peers, which never waits, by the share of a core
that it had; those of tensor-parallel ranks by the cores there are. A fixed piece of work beside each profile tells at
which pace the machine was then; all are told for their mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import ceil, log2
from statistics import fmean, median
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
"""Steps that are profiled, and the quickest of them, whose mean counts: who takes turns has some actions in one go, and
the others last twice as long."""
PACE = 16
"""Repetitions of the work that tells the machine's pace."""
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
    had, paces = list[float](), list[float]()
    with engine.profile() as profile:
        for _ in range(STEPS):
            meet()
            paces.append(pace())
            meet()
            begin, worked = time.perf_counter(), time.process_time()
            engine.step(batch)
            had.append((time.process_time() - worked) / (time.perf_counter() - begin))
    engine.close()
    recorded = profile.recorded
    if recorded is None:
        return {}
    quick = sorted(range(STEPS), key=lambda i: recorded.step(i).seconds)[:KEPT]
    own = min(fmean(had[i] for i in quick), 1.0)
    made = json.loads(mean_step(recorded, quick).to_json())
    return {
        "plan": json.loads(engine.plan.to_json()), "profile": made, "own": own, "pace": fmean(paces[i] for i in quick)
    }  # fmt: skip


def pace() -> float:
    """Seconds of the CPU, some 20 ms of it, for a fixed piece of work: small products, norms and their gradients.

    The cores of a virtual machine are shared with others, and may need twice the time for the same work a minute later.
    """
    x, weights = torch.ones(64, 256), [torch.full((256, 256), 1 / 256, requires_grad=True) for _ in range(4)]
    begin = time.process_time()
    for _ in range(PACE):
        y = x
        for weight in weights:
            y = torch.nn.functional.layer_norm(torch.nn.functional.gelu(y @ weight) + y, (256,))
        y.square().mean().backward()
    return time.process_time() - begin


def mean_step(recorded: Recorded, which: Sequence[int]) -> Recorded:
    """One step whose every time is the mean of some steps'."""

    def mean(records: Sequence[Record]) -> Record:
        return Record(records[0].action, *(fmean(times) for times in zip(*(r[1:] for r in records), strict=True)))

    steps, tails = [recorded.steps[i] for i in which], [recorded.tails[i] for i in which]
    ranks = tuple(tuple(map(mean, zip(*rank, strict=True))) for rank in zip(*steps, strict=True))
    return Recorded(recorded.plan, (ranks,), (tuple(map(fmean, zip(*tails, strict=True))),))


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
    """In each process of a job: median seconds of messages from rank 0 to 1 and back, halved, of sums over all, and of
    sums over pairs, all at once."""
    ranks = dist.get_world_size()

    def there_and_back(message: torch.Tensor) -> None:
        for sender in (0, 1):
            if dist.get_rank() in (0, 1):
                (dist.send if dist.get_rank() == sender else dist.recv)(message, 1 - dist.get_rank())

    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    own = pairs[dist.get_rank() // 2]
    return {
        "messages": [each / 2 for each in _timed(there_and_back)],
        "sums": _timed(dist.all_reduce),
        "pairs": _timed(lambda message: dist.all_reduce(message, group=own)),
    }


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


def joined(rough: Hardware, known: Mapping[str, Mapping[str, list[float]]], row: Row, cores: int) -> Hardware:
    """The machine with what was timed: latencies are those of the quickest, bandwidths come from the largest.

    Gradients are summed in as many groups at once as the row has. A step has one sum of few numbers over all ranks, and
    is timed between two barriers, which are another.
    """
    messages, timed = known["2"]["messages"], known[str(max(row.ranks, 2))]
    own, many = min(cores / row.ranks, 1.0), max(row.dp, row.tp, 2)
    sums = timed["sums"] if many == row.ranks else timed["pairs"]
    line = Link(_slope(messages), min(messages))  # not of the first: they may be slow until the machine is awake
    share = 2 * (many - 1) / many * _slope(sums) / own / line.bandwidth
    call = max(own * min(sums) - 2 * ceil(log2(many)) * line.latency, 0.0)
    each = 2 * own * min(timed["sums"])
    return replace(rough, intra=line, intra_efficiency=share, collective_seconds=call, step_seconds=each)


def _slope(times: list[float]) -> float:
    """Bytes per second."""
    return (SIZES[-1] - SIZES[1]) / max(times[-1] - times[1], 1e-9)


def calibrated(
    shorts: Sequence[Row], profiles: Mapping[str, Any], machine: Hardware, cores: int, paced: float
) -> Hardware:
    """The machine as the profiles of some shortened rows have it, as if all were taken at the same pace of it."""
    told = {row.name: profiles[row.name] for row in shorts}
    own = [told[row.name]["own"] if row.ranks == 1 else min(cores / row.ranks, 1.0) for row in shorts]
    pairs = [_pair(one, machine, share * paced / one["pace"]) for one, share in zip(told.values(), own, strict=True)]
    found = calibrate(pairs)
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
