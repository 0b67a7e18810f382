"""How fast a run is: seconds, items, and the share of the devices' peak that the model's arithmetic takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from merak_like.partitioner.hardware import PRESETS
from merak_like.partitioner.plan import Plan
from merak_like.runtime import collect
from merak_like.runtime.engine import Engine

BACKWARD = 3
"""Forward and backward together, in forwards: the backward of a matmul is two matmuls. Recompute is not counted."""


@dataclass
class Meter:
    """Sums between two lines of the log."""

    flops: float
    """Of the model for one planned step, forward and backward, over all ranks."""
    samples: int
    """Of a planned step."""
    ranks: int
    peak: float | None
    """Of one device, in flops per second; None where nobody knows."""
    steps: int = 0
    items: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def add(self, items: int, waited: float) -> None:
        """A step is done; ``waited`` is how many seconds it had to wait for data."""
        self.steps, self.items, self.waited = self.steps + 1, self.items + items, self.waited + waited

    def read(self, batch: int) -> dict[str, float]:
        """The numbers since the last reading, and a new beginning. ``batch`` is the samples of a step."""
        took = max(time.perf_counter() - self.began, 1e-9)
        achieved = self.flops * batch / self.samples * self.steps / took / self.ranks
        line = {
            "seconds_per_step": took / max(self.steps, 1),
            "items_per_second": self.items / took,
            "data_wait": self.waited / took,
            "tflops_per_rank": achieved / 1e12,
        }
        if self.peak:
            line["model_flops_utilisation"] = achieved / self.peak
        self.steps, self.items, self.waited = 0, 0, 0.0
        self.began = time.perf_counter()
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of something else, such as an evaluation."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped


def meter(plan: Plan, dtype: str) -> Meter:
    """The meter of a plan's model; items and times are those of the whole job."""
    parts = plan.mesh.dp * plan.micro_batches
    known = PRESETS.get(plan.hardware)
    return Meter(
        flops=BACKWARD * parts * float(sum(stage.flops for stage in plan.stages)),
        samples=parts * plan.micro_batch,
        ranks=plan.mesh.size,
        peak=known.peak_flops.get(dtype) if known else None,
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has had: of its GPU, or on a CPU the resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def most_memory(engine: Engine) -> dict[str, Any]:
    """The peak memory of the fullest rank, which it is, and that of each."""
    everyone = collect.from_all(peak_bytes(engine.world.device), engine.world, engine._watch)
    return {
        "peak_memory_bytes": max(everyone), "fullest_rank": everyone.index(max(everyone)),
        "peak_memory_bytes_of_ranks": everyone,
    }  # fmt: skip
