"""How fast is a pipeline step beside the peers, on the same stages? See README.md.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/pipeline/main.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/pipeline/main.py --layers 12 --hidden 512 --out deep.json

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
from contenders import TORCH, deepspeed_pipeline, gpt2, merak, one_process, torch_pipelining

MICRO_BATCHES, MICRO_BATCH, SEQ = 8, 2, 128
OURS = ("gpipe", "interleaved", "zb-h1", "zb-v", "auto")


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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in a round")
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
        **{f"ours ({name})": merak(config, ids, MICRO_BATCHES, name)[0] for name in OURS},
        **{f"torch Schedule{kind}": torch_pipelining(config, ids, MICRO_BATCHES, cut, kind) for kind in TORCH},
    }
    if find_spec("deepspeed") is None:
        print("DeepSpeed is not installed (extra [deepspeed]): left out")
    elif "DeepSpeed" not in args.without:
        contenders["DeepSpeed PipelineModule"] = deepspeed_pipeline(config, ids, MICRO_BATCHES)
    losses = {name: step() for name, step in contenders.items()}
    check(losses)
    for step in contenders.values():
        timed(step, alone=False)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    busy: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(args.rounds):
        for name in (names[turn % len(names) :] + names)[: len(names)]:
            step = contenders[name]
            times = [timed(step, alone=name == "one process") for _ in range(args.steps)]
            seconds[name].append(min(t for t, _ in times))  # others on the machine only add
            busy[name].append(min(t for _, t in times))
    if rank == 0:
        report(args, seconds, busy)
    dist.barrier()
    dist.destroy_process_group()


def check(losses: dict[str, float]) -> None:
    """All have the loss of the plain loop; a peer tells it on the rank that its schedule ends on, the others have 0."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, losses)
    due = found[0]["one process"]
    for name in losses:
        told = [of[name] for of in found if of[name]]
        assert told and all(abs(loss - due) < 1e-3 for loss in told), f"{name} has losses {told}, {due} due"  # noqa: PT018


def report(args: argparse.Namespace, seconds: dict[str, list[float]], busy: dict[str, list[float]]) -> None:
    """Write the numbers and print the table."""
    single = seconds["one process"]
    ideal = [t / 2 * (MICRO_BATCHES + 1) / MICRO_BATCHES for t in single]
    peers = [name for name in seconds if name.startswith(("torch", "DeepSpeed"))]
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "CPU milliseconds": 1e3 * statistics.median(busy[name]),
            "to torch 1F1B": statistics.median(
                a / b for a, b in zip(times, seconds["torch Schedule1F1B"], strict=True)
            ),
            "to the best peer": statistics.median(a / b for a, b in zip(times, seconds[best], strict=True)),
            "to half of one process + bubble": statistics.median(a / b for a, b in zip(times, ideal, strict=True)),
        }
    setting = {
        "layers": args.layers, "hidden": args.hidden, "sequence": SEQ,
        "micro-batches": f"{MICRO_BATCHES} x {MICRO_BATCH}",
        "rounds": args.rounds, "steps per round": args.steps, "torch": torch.__version__,
        "transformers": transformers.__version__, "DeepSpeed": _version("deepspeed"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(json.dumps(setting))
    for name, row in rows.items():
        print(f"{name:28s}" + "".join(f"{key}: {value:8.3f}   " for key, value in row.items()))


if __name__ == "__main__":
    main()
