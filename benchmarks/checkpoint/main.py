"""How long does a checkpoint stop training, waited for and in the background? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint/main.py

One process, so that nothing but the save itself can stop it. Rounds alternate; the median of their ratios is told.
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
from pathlib import Path

import torch
from torch import nn

from merak_like import auto_parallel


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and write results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    asked = parser.parse_args()
    torch.manual_seed(0)
    layers = [layer for _ in range(asked.layers) for layer in (nn.Linear(asked.width, asked.width), nn.Tanh())]
    batch = torch.randn(64, asked.width)
    engine = auto_parallel(
        nn.Sequential(*layers), example=batch, loss_fn=lambda out, batch: (out - batch).square().mean(),
        optimizer=torch.optim.AdamW, micro_batches=1, device="cpu", hardware="a100-80gb",
    )  # fmt: skip
    engine.step(batch)
    rows: dict[str, list[float]] = {"step": [], "blocking save": [], "background save: the call": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        engine.save(name, background=True, keep=1)  # the first one gets the memory that later ones use again
        engine.saved()
        for _ in range(asked.rounds):
            rows["step"].append(timed(lambda: engine.step(batch)))
            rows["blocking save"].append(timed(lambda: engine.save(name, keep=1)))
            rows["background save: the call"].append(timed(lambda: engine.save(name, background=True, keep=1)))
            engine.saved()
        size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file())
    engine.close()
    stalls = [b / a for a, b in zip(rows["blocking save"], rows["background save: the call"], strict=True)]
    found = {
        "milliseconds": {key: round(1e3 * statistics.median(values), 1) for key, values in rows.items()},
        "stall, share of a blocking save": round(statistics.median(stalls), 4),
        "stalls": [round(stall, 4) for stall in stalls],
        "setting": {
            "bytes": size, "rounds": asked.rounds, "torch": torch.__version__, "cores": os.cpu_count(),
            "machine": platform.machine(), "load average": os.getloadavg()[0],
        },
    }  # fmt: skip
    Path(__file__).with_name("results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
