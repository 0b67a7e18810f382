"""Runs of ``Trainer`` that are stopped, killed and started again, in one process or in many, and what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback

from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import (
    Checkpoints,
    Degree,
    Evaluation,
    Logging,
    Optimizer,
    Parallelism,
    Schedule,
    Settings,
    Training,
)
from tests.ranks import here

STEPS = 12


def model(drop: float = 0.2) -> nn.Module:
    """With dropout, whose random numbers must go on too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 4)).double()


def loss(out: Tensor, batch: Tensor) -> Tensor:
    """Say the input backwards."""
    return (out - batch.flip(1)).square().mean()


SAMPLES = [torch.randn(4, generator=torch.Generator().manual_seed(i)).double() for i in range(30)]


PARTS = 4
"""Micro-batches of a step, over all replicas."""


def asked(folder: Path, dp: Degree = 1, pp: int = 1, **more: Any) -> Settings:
    """Twelve steps with everything that has a memory: warm-up, cosine, evaluations, the best, a log every 5 steps."""
    micro_batches = PARTS // dp if isinstance(dp, int) else None
    spread = Parallelism(
        dp=dp, pp=pp, micro_batches=micro_batches, hardware="a100-80gb", device="cpu", timeout=60.0
    )  # fmt: skip
    given: dict[str, Any] = {
        "training": Training(steps=STEPS, batch=4), "parallelism": spread,
        "optimizer": Optimizer(lr=0.05, weight_decay=0.1), "schedule": Schedule(name="cosine", warmup=3),
        "evaluation": Evaluation(every=4, batch=4), "checkpoints": Checkpoints(every=3, best=True),
        "logging": Logging(every=5, console=False), "folder": folder,
    }  # fmt: skip
    return Settings(**(given | more))


def trainer(folder: Path, *callbacks: Any, dp: Degree = 1, pp: int = 1, drop: float = 0.2, **more: Any) -> Trainer:
    """A new process's, as it were."""
    patience = EarlyStoppingCallback(early_stopping_patience=50)
    return Trainer(
        model(drop), asked(folder, dp, pp, **more), SAMPLES[:24], SAMPLES[24:], loss_fn=loss,
        callbacks=[patience, *callbacks],
    )  # fmt: skip


TIMES = {"time", "seconds_per_step", "items_per_second", "data_wait", "tflops_per_rank", "train_steps", "train_seconds",
         "model_flops_utilisation", "peak_memory_bytes", "fullest_rank", "peak_memory_bytes_of_ranks", "bubble",
         "planned_bubble"}  # fmt: skip


def left(one: Trainer) -> Any:
    """All that a run leaves, but for its times: weights, the loop's state, the lines of its file; on rank 0."""
    weights = {name: tensor.tolist() for name, tensor in one.engine.full_state_dict().items()}
    if one.engine.world.rank:
        return None
    state = one.state.to_json()
    del state["best_in"]
    state["history"] = [{k: v for k, v in line.items() if k not in TIMES} for line in state["history"]]
    lines = [json.loads(line) for line in (one.args.folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return weights, state, [line for line in told if len(line) > 1]


# ---------------------------------------------------------------------------------------------------- in many processes


def go_on(dp: int, pp: int, folder: str, resume: str) -> Any:
    """Take up another layout's checkpoint, and end; what is left, on rank 0."""
    one = trainer(Path(folder) / f"{dp}x{pp}", dp=dp, pp=pp)
    one.train(resume=resume)
    found = left(one)
    one.close()
    return found


class At(TrainerCallback):
    """Does something at the end of a step, or in the midst of an evaluation."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


class Paced(TrainerCallback):
    """So slow that a signal finds it at work, and saying when it is."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)
        if state.global_step == 3:
            here("working")


def until_told(dp: int, pp: int, folder: str) -> None:
    """Train until a rank is told to end."""
    one = trainer(Path(folder), Paced(), dp=dp, pp=pp, training=Training(steps=5000, batch=4))
    one.train()
    assert one.interrupted
    here(f"step-{one.state.step}")
    one.close()


def two_runs(dp: int, pp: int, folder: str) -> list[int]:
    """One run after the other; in the first life all die in the second one."""
    done: list[int] = []
    for name in "ab":
        die = [At(7, lambda: os.kill(os.getpid(), signal.SIGKILL))]
        last = name == "b" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        one = trainer(Path(folder) / name, *(die if last else []), dp=dp, pp=pp)
        one.train()
        done.append(one.state.step)
        one.close()
    return done


def spread(dp: int, pp: int, folder: str, **parallelism: Any) -> Any:
    """A run whose replicas share what they have; what is left, on rank 0."""
    plain = asked(Path(folder), dp, pp).parallelism
    one = trainer(
        Path(folder), drop=0.0, parallelism=Parallelism(**(plain.model_dump(exclude_defaults=True) | parallelism))
    )  # fmt: skip
    one.train()
    found = left(one)
    one.close()
    return found


def survivor(dp: Degree, pp: int, folder: str, steps: int, deaths: int) -> Any:
    """Train through SIGKILLs at random moments, of a random rank in each life but the last; nobody asks to resume."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    draw = random.Random(f"{life} {deaths}")
    mine = int(os.environ["RANK"]) == draw.randrange(int(os.environ["WORLD_SIZE"]))
    one = trainer(
        Path(folder), Slow(life < deaths), dp=dp, pp=pp, training=Training(steps=steps, batch=4),
        checkpoints=Checkpoints.model_validate({"every": 3, "best": True, "async": bool(life % 2)}),
    )  # fmt: skip
    if life < deaths and mine:
        threading.Timer(draw.uniform(0.3, 1.5), os.kill, (os.getpid(), signal.SIGKILL)).start()
    one.train()
    found = left(one)
    one.close()
    assert life == deaths, "it was through before its death"
    return found


class Slow(TrainerCallback):
    """Or a run would be through before its death."""

    def __init__(self, slow: bool) -> None:
        self.slow = slow

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.05 * self.slow)


def fewer(dp: Degree, pp: int, folder: str) -> Any:
    """Train until the second node is lost, its agent and all; the ranks that are left choose their degrees anew."""

    class Lost(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if os.environ.get("LOST") and state.global_step == 8:
                with suppress(ProcessLookupError):
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    one = trainer(Path(folder), Lost(), dp=dp, pp=pp, drop=0.0)
    one.train()
    found = left(one)
    size = one.engine.plan.mesh.dp
    one.close()
    return [found, size]
