"""How fast is a pipeline step beside the peers, on the same stages? See README.md.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/pipeline/main.py

One job runs every contender in turn, a few steps each, round after round, so that what else the machine does hits all
of them; each round begins with another contender, since the first to run on two cores after one was idle pays for it.
A step is timed from a barrier before it to a barrier after it. Ratios are taken per round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers
from contenders import deepspeed_pipeline, gpt2, merak, one_process, torch_pipelining

MICRO_BATCHES, MICRO_BATCH, SEQ = 8, 2, 128


def timed(step: Callable[[], float], alone: bool) -> tuple[float, float]:
    """Seconds of one step, from all ranks ready to all ranks done, and CPU seconds of the busiest rank.

    The others idle while rank 0 works alone.
    """
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    if not alone or dist.get_rank() == 0:
        step()
    spent = torch.tensor(time.process_time() - cpu)
    dist.barrier()
    seconds = time.perf_counter() - start
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return seconds, spent.item()


def _version(package: str) -> str:
    return version(package) if find_spec(package) else "not installed"


def main() -> None:
    """Measure and write results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contender in a round")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (MICRO_BATCHES * MICRO_BATCH, SEQ))
    config = gpt2(args.layers, args.hidden, SEQ)
    ours, cut = merak(config, ids, MICRO_BATCHES, "1f1b")
    contenders: dict[str, Callable[[], float]] = {
        "one process": one_process(config, ids, MICRO_BATCHES) if rank == 0 else float,
        "ours (1f1b)": ours,
        "ours (1f1b, fuse=False)": merak(config, ids, MICRO_BATCHES, "1f1b", fuse=False)[0],
        **{f"ours ({name})": merak(config, ids, MICRO_BATCHES, name)[0] for name in ("gpipe", "zb-v", "auto")},
        "torch Schedule1F1B": torch_pipelining(config, ids, MICRO_BATCHES, cut, "1F1B"),
        "torch ScheduleGPipe": torch_pipelining(config, ids, MICRO_BATCHES, cut, "GPipe"),
    }
    if find_spec("deepspeed") is None:
        print("DeepSpeed is not installed (extra [deepspeed]): left out")
    elif "DeepSpeed" not in args.without:
        contenders["DeepSpeed PipelineModule"] = deepspeed_pipeline(config, ids, MICRO_BATCHES)
    losses = {name: step() for name, step in contenders.items()}
    for step in contenders.values():
        timed(step, alone=False)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    busy: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(args.rounds):
        for name in (names[turn % len(names) :] + names)[: len(names)]:
            step = contenders[name]
            times = [timed(step, alone=name == "one process") for _ in range(args.steps)]
            seconds[name].append(statistics.median(t for t, _ in times))
            busy[name].append(statistics.median(t for _, t in times))
    if rank == 0:
        report(args, seconds, busy, losses)
    dist.barrier()
    dist.destroy_process_group()


def report(
    args: argparse.Namespace, seconds: dict[str, list[float]], busy: dict[str, list[float]], losses: dict[str, float]
) -> None:
    """Write the numbers and print the table."""
    single = seconds["one process"]
    ideal = [t / 2 * (MICRO_BATCHES + 1) / MICRO_BATCHES for t in single]
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "CPU milliseconds": 1e3 * statistics.median(busy[name]),
            "to torch 1F1B": statistics.median(
                a / b for a, b in zip(times, seconds["torch Schedule1F1B"], strict=True)
            ),
            "to half of one process + bubble": statistics.median(a / b for a, b in zip(times, ideal, strict=True)),
            "first loss on rank 0": losses[name],
        }
    setting = {
        "layers": args.layers, "hidden": args.hidden, "sequence": SEQ,
        "micro-batches": f"{MICRO_BATCHES} x {MICRO_BATCH}",
        "rounds": args.rounds, "steps per round": args.steps, "torch": torch.__version__,
        "transformers": transformers.__version__, "DeepSpeed": _version("deepspeed"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load average": os.getloadavg()[0],
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(json.dumps(setting))
    for name, row in rows.items():
        print(f"{name:28s}" + "".join(f"{key}: {value:8.3f}   " for key, value in row.items()))


if __name__ == "__main__":
    main()
