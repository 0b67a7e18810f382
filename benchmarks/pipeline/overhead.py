"""What the engine itself costs: CPU microseconds per micro-batch and per action, on layers too small to matter.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/pipeline/overhead.py

The slope of a step's CPU time (all threads: gloo has its own) over the number of micro-batches, less what the bare
forward and backward of the same stage cost; the same for torch.distributed.pipelining. All take turns, step by step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from merak_like import auto_parallel

WIDTH, FEW, MANY, ROUNDS = 8, 16, 80, 41


def layers() -> nn.Sequential:
    """Eight tiny layers, four for each stage."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))


def loss_of(output: Tensor, batch: object) -> Tensor:
    """Any scalar."""
    return output.square().mean()


def slopes(contenders: Mapping[str, Callable[[int], Callable[[], object]]]) -> dict[str, float]:
    """CPU seconds of one more micro-batch, by contender."""
    steps = {(name, count): make(count) for name, make in contenders.items() for count in (FEW, MANY)}
    times = {key: list[float]() for key in steps}
    for _ in range(ROUNDS):
        for key, step in steps.items():
            dist.barrier()
            start = time.process_time()
            step()
            times[key].append(time.process_time() - start)
    costs = {key: statistics.median(each[1:]) for key, each in times.items()}  # the first step warms up
    return {name: (costs[name, MANY] - costs[name, FEW]) / (MANY - FEW) for name in contenders}


def bare(count: int) -> Callable[[], object]:
    """Forward and backward of four layers, nothing else."""
    half = layers()[:4]
    x = torch.rand(1, WIDTH, requires_grad=True)

    def step() -> None:
        for _ in range(count):
            half(x.detach().requires_grad_()).square().mean().backward()

    return step


def ours(count: int) -> Callable[[], object]:
    """Our engine, 1F1B."""
    batch = torch.rand(count, WIDTH)
    engine = auto_parallel(layers(), pp=2, example=batch, loss_fn=loss_of, micro_batches=count, hardware="a100-80gb")
    return lambda: engine.step(batch)


def theirs(count: int) -> Callable[[], object]:
    """torch.distributed.pipelining, 1F1B."""
    rank, batch = dist.get_rank(), torch.rand(count, WIDTH)
    stage = PipelineStage(layers()[4 * rank : 4 * rank + 4], rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, count, loss_fn=loss_of)
    return lambda: schedule.step(batch) if rank == 0 else schedule.step(target=batch)


def main() -> None:
    """Print and write overhead.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = slopes({"bare": bare, "ours (1f1b)": ours, "torch Schedule1F1B": theirs})
    compute, rows = found.pop("bare"), {}
    for name, cost in found.items():
        each = torch.tensor((cost - compute) * 1e6)
        dist.all_reduce(each, dist.ReduceOp.MAX)
        # a stage of a two-stage pipeline does F, B, one send and one receive per micro-batch
        rows[name] = {"per micro-batch": round(each.item()), "per action": round(each.item() / 4)}
    if dist.get_rank() == 0:
        result = {"bare forward and backward": round(compute * 1e6), "overhead, microseconds": rows}
        Path(__file__).with_name("overhead.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
