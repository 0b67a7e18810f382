"""How long does a checkpoint stop training, waited for and in the background, and what does the trainer add to a step?

    OMP_NUM_THREADS=1 python benchmarks/checkpoint/main.py

One process, so that nothing but the save itself can stop it. Rounds alternate; the median of their ratios is told. What
a save costs is its call and what the step after it takes longer than one that follows no save. See README.md.
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
from typing import Any

import torch
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Logging, Parallelism, Settings, Training

HERE: dict[str, Any] = {"micro_batches": 1, "device": "cpu", "hardware": "a100-80gb"}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and of the process's CPU meanwhile, all of its threads together."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - busy


def model_of(width: int, layers: int) -> nn.Module:
    """Layers of one width."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))


def loss(out: Tensor, batch: Tensor) -> Tensor:
    """Say the input again."""
    return (out - batch).square().mean()


def saving(width: int, layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What both ways to save cost, in the same rounds."""
    batch = torch.randn(64, width)
    engine = auto_parallel(
        model_of(width, layers), example=batch, loss_fn=loss, optimizer=torch.optim.AdamW, **HERE
    )  # fmt: skip
    names = ("step", "blocking save", "step after it", "background save: the call", "step beside the writing")
    rows: dict[str, list[float]] = {name: [] for name in names}

    def step() -> None:
        engine.step(batch)

    step()
    engine.save(folder, background=True, keep=1)  # the first one gets the memory that later ones use again
    engine.saved()
    for _ in range(rounds):
        rows["step"].append(timed(step)[0])
        rows["blocking save"].append(timed(lambda: engine.save(folder, keep=1))[0])
        rows["step after it"].append(timed(step)[0])
        rows["background save: the call"].append(timed(lambda: engine.save(folder, background=True, keep=1))[0])
        rows["step beside the writing"].append(timed(step)[0])
        engine.saved()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    engine.close()
    calls = [b / a for a, b in zip(rows["blocking save"], rows["background save: the call"], strict=True)]
    usual = statistics.median(rows["step"])
    stalls = [
        (call + beside - usual) / (save + after - usual)
        for save, after, call, beside in zip(*(rows[name] for name in names[1:]), strict=True)
    ]
    return {
        "milliseconds": {key: round(1e3 * statistics.median(values), 1) for key, values in rows.items()},
        "the call, share of a blocking save": round(statistics.median(calls), 4),
        "the call and the step after it, share of a blocking save": round(statistics.median(stalls), 4),
        "of every round": [round(stall, 4) for stall in stalls],
        "bytes": size,
    }


def added(width: int, layers: int, steps: int, folder: Path) -> dict[str, float]:
    """What the loop takes beside the engine's steps, in one run: logs, data, rates, callbacks' events."""
    settings = Settings(
        training=Training(steps=steps, batch=64), parallelism=Parallelism(**HERE), folder=folder,
        logging=Logging(every=5, console=False),
    )  # fmt: skip
    data = list(torch.randn(512, width).unbind())
    trainer = Trainer(model_of(width, layers), settings, data, loss_fn=loss)
    inside, own, ends = [0.0, 0.0], trainer.engine.step, list[tuple[float, float]]()

    def step(*arguments: Any, **more: Any) -> Any:
        found: list[Any] = []
        wall, busy = timed(lambda: found.append(own(*arguments, **more)))
        if ends:  # from the end of the first step on: before it the program of this shape is made
            inside[0] += wall
            inside[1] += busy
        ends.append((time.perf_counter(), time.process_time()))
        return found[0]

    trainer.engine.step = step  # type: ignore[method-assign]
    trainer.train()
    trainer.close()
    wall, busy = (b - a for a, b in zip(ends[0], ends[-1], strict=True))
    return {
        "engine's step, ms": round(1e3 * inside[0] / (len(ends) - 1), 3),
        "added by the loop": round(wall / inside[0] - 1, 5),
        "added by the loop and its threads, CPU": round(busy / inside[1] - 1, 5),
    }


def main() -> None:
    """Measure and write results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        found = saving(asked.width, asked.layers, asked.rounds, Path(name) / "saved")
        found["trainer"] = added(asked.width, asked.layers, asked.steps, Path(name) / "run")
    found["setting"] = {
        "rounds": asked.rounds, "steps": asked.steps, "torch": torch.__version__, "cores": os.cpu_count(),
        "machine": platform.machine(), "load average": os.getloadavg()[0],
    }  # fmt: skip
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
