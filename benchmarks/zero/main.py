"""Is spreading over replicas as fast as the peers' at the same level, and what does a save cost? See README.md.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/zero/main.py

One job runs every contender in turn, round after round, each round beginning with another one. A step is timed from a
barrier before it to a barrier after it; ratios are taken per round, and the median is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from rivals import ddp, deepspeed_zero, fsdp2, model_of, ours

from merak_like import Engine

MICRO_BATCHES, MICRO_BATCH, SEQ = 4, 2, 128


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds from all ranks ready to all ranks done, and of the busier rank's CPU with all of its threads."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    work()
    own = torch.tensor([time.process_time() - busy], dtype=torch.float64)
    dist.barrier()
    wall = time.perf_counter() - start
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return wall, own.item()


def saving(engine: Engine, step: Callable[[], object], folder: Path, times: int) -> dict[str, float]:
    """How long training stands still for a checkpoint that is waited for, and for one written in the background."""
    rows: dict[str, list[float]] = {"blocking save": [], "background save: the call": [], "step": []}
    slowed: list[float] = []
    for _ in range(times):
        rows["step"].append(timed(step)[0])
        rows["blocking save"].append(timed(lambda: engine.save(folder, keep=1))[0])
        timed(step)
        rows["background save: the call"].append(timed(lambda: engine.save(folder, background=True, keep=1))[0])
        slowed.append(timed(step)[0])
        engine.saved()
    rows["step beside the writing"] = slowed
    return {f"{name}, ms": 1e3 * statistics.median(values) for name, values in rows.items()}


def main() -> None:
    """Measure and write results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="of a contender in a round; the fastest counts")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ids = torch.randint(0, 1000, (2 * MICRO_BATCHES * MICRO_BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    model = lambda: model_of(args.layers, args.hidden, SEQ)  # noqa: E731
    contenders = {f"ours, zero={level}": ours(model(), ids, MICRO_BATCHES, level) for level in LEVELS}
    if find_spec("deepspeed") is not None:
        contenders["ours, zero_backend=deepspeed"] = ours(model(), ids, MICRO_BATCHES, 1, "deepspeed")
    engine = contenders["ours, zero=1"][1]
    steps: dict[str, Callable[[], float]] = {name: step for name, (step, _) in contenders.items()}
    steps |= {
        "DDP": ddp(model(), ids, MICRO_BATCHES, spread=False),
        "DDP + ZeroRedundancyOptimizer": ddp(model(), ids, MICRO_BATCHES, spread=True),
        "FSDP2, summed once": fsdp2(model(), ids, MICRO_BATCHES, every=False, keep=True),
        "FSDP2, weights kept": fsdp2(model(), ids, MICRO_BATCHES, every=True, keep=True),
        "FSDP2": fsdp2(model(), ids, MICRO_BATCHES, every=True, keep=False),
    }
    if find_spec("deepspeed") is not None:
        steps |= {f"DeepSpeed ZeRO-{n}": deepspeed_zero(model(), ids, MICRO_BATCHES, n) for n in (1, 2, 3)}
    losses = {name: [step() for _ in range(3)][-1] for name, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(args.rounds):
        for name in (names[turn % len(names) :] + names)[: len(names)]:
            every = [timed(steps[name]) for _ in range(args.steps)]
            times[name].append((min(wall for wall, _ in every), min(busy for _, busy in every)))
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        saved = saving(engine, steps["ours, zero=1"], Path(shared[0]) / "run", 5)
    if dist.get_rank() == 0:
        report(args, times, losses, saved)
    for _, one in contenders.values():
        one.close()
    dist.barrier()
    dist.destroy_process_group()


LEVELS = {0: ("DDP",), 1: ("DDP + ZeroRedundancyOptimizer", "FSDP2, summed once", "DeepSpeed ZeRO-1"),
          2: ("FSDP2, weights kept", "DeepSpeed ZeRO-2"), 3: ("FSDP2", "DeepSpeed ZeRO-3")}  # fmt: skip
"""Level to the peers at it."""


def report(
    args: argparse.Namespace, times: dict[str, list[tuple[float, float]]], losses: dict[str, float],
    saved: dict[str, float],
) -> None:  # fmt: skip
    """Write the numbers and print them."""

    def ratio(name: str, to: str, which: int) -> float:
        return statistics.median(a[which] / b[which] for a, b in zip(times[name], times[to], strict=True))

    level_of = {peer: level for level, peers in LEVELS.items() for peer in peers}
    rows: dict[str, dict[str, float]] = {}
    for name, own in times.items():
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(wall for wall, _ in own),
            "CPU milliseconds": 1e3 * statistics.median(busy for _, busy in own),
            "loss of the third step": losses[name],
        }
        if name in level_of:
            mine = f"ours, zero={level_of[name]}"
            rows[name] |= {"ours to it": ratio(mine, name, 0), "ours to it, CPU": ratio(mine, name, 1)}
    setting = {
        "layers": args.layers, "hidden": args.hidden, "sequence": SEQ,
        "micro-batches of a replica": f"{MICRO_BATCHES} x {MICRO_BATCH}", "rounds": args.rounds, "steps": args.steps,
        "torch": torch.__version__, "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": setting, "rows": rows, "saving": saved}, indent=1) + "\n")
    print(json.dumps(setting))
    for name, row in rows.items():
        print(f"{name:32s}" + "".join(f"{key}: {value:8.3f}   " for key, value in row.items()))
    print(saved)


if __name__ == "__main__":
    main()
