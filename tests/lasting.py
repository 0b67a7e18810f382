"""What the ranks do in the tests of checkpoints: train, save, die, go on; and what must be equal in the end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from merak_like import Engine
from tests import training
from tests.faults import items, rank, small
from tests.ranks import here
from tests.scenarios import PARTS, SAMPLES, digest, is_statistics, leads
from tests.training import Subject, in_one_precision, subject

STEPS, SAVED = 6, 3
"""Of an unbroken run, and where it saves."""


def groups(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with no decay on vectors, as people train."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]
    return torch.optim.AdamW([{"params": kinds[0], "weight_decay": 0.1}, {"params": kinds[1], "lr": 3e-3}], lr=1e-3)


def job(name: str, dp: int, pp: int, **more: Any) -> tuple[Subject, Engine, Any]:
    """A model with dropout or batch norm, its engine and its schedule."""
    one = subject(name) if "precision" in more else in_one_precision(name)
    engine = training.engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, optimizer=groups, **more)
    assert engine.optimizer is not None
    return one, engine, torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, 10)


def train(one: Subject, engine: Engine, schedule: Any, until: int) -> list[float]:
    """Some steps; what each draws from the generators of the process counts, too."""
    losses = []
    while engine.steps < until:
        losses.append(engine.step(one.batch(SAMPLES)).loss)
        losses.append(random.random() + torch.rand(1).item())
        schedule.step()
    return losses


def unbroken(name: str, dp: int, pp: int, folder: str, **more: Any) -> list[float]:
    """Train all steps, and save on the way: once while all wait, once in the background."""
    torch.manual_seed(5)
    random.seed(5)
    one, engine, schedule = job(name, dp, pp, **more)
    train(one, engine, schedule, SAVED - 1)
    state: dict[str, Any] = {"schedule": schedule, "position": engine.steps}
    first = engine.save(folder, state=state)
    train(one, engine, schedule, SAVED)
    state["position"] = engine.steps
    none = engine.save(folder, state=state, background=True)
    losses = train(one, engine, schedule, STEPS)
    second = engine.saved()
    weights = engine.full_state_dict()
    engine.close()
    assert first is not None
    assert first.is_dir()
    assert none is None
    assert second == Path(folder) / f"step-{SAVED:08d}"
    if leads():
        torch.save({"losses": losses, "weights": weights}, Path(folder) / "end.pt")
    return losses


def go_on(name: str, dp: int, pp: int, folder: str, exact: bool, **more: Any) -> float:
    """Load, and train to the end: the end of the unbroken run, bit for bit where the layout is the same."""
    one, engine, schedule = job(name, dp, pp, **more)
    restored = engine.load(folder, state={"schedule": schedule})
    losses = train(one, engine, schedule, STEPS)
    weights = engine.full_state_dict()
    engine.close()
    assert restored.step == restored.state["position"] == SAVED
    if not leads():
        return 0.0
    end = torch.load(Path(folder) / "end.pt", weights_only=True)
    if exact:
        assert losses == end["losses"]
        assert {k: digest(v) for k, v in weights.items()} == {k: digest(v) for k, v in end["weights"].items()}
        return 0.0
    kept = [{k: v for k, v in side.items() if not is_statistics(k)} for side in (weights, end["weights"])]
    apart = max(abs(a - b) for a, b in zip(losses[::2], end["losses"][::2], strict=True))
    return max(apart, training.worst(*kept)[0])


def refusals(dp: int, pp: int, folder: str) -> list[str]:
    """Checkpoints that are not of this job, on every rank; then all goes on."""
    said: list[str] = []

    def refused(engine: Engine, state: Any = None) -> None:
        try:
            engine.load(folder, state=state)
        except ValueError as error:
            said.append(str(error))

    engine = small(dp, pp)
    refused(engine)
    engine.step(items())
    engine.close()
    one = subject("gpt2")
    for more in ({"optimizer": torch.optim.SGD}, {"optimizer": training.adamw}):
        engine = training.engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, **more)
        refused(engine)
        engine.close()
    _, engine, schedule = job("gpt2", dp, pp)
    refused(engine, {"sampler": schedule})
    try:
        engine.save(folder, state={"odd": object()})
    except ValueError as error:
        said.append(str(error))
    engine.close()
    return said


# ------------------------------------------------------------------------------------- processes that are lost, in bare


def until_told(dp: int, pp: int, folder: str, phase: str) -> None:
    """Train, or evaluate, until a rank is told to end; then save."""
    engine = small(dp, pp)
    engine.stop_at(signal.SIGTERM, signal.SIGUSR1)
    rounds = 0
    while not engine.stopping:
        if phase == "training" or rounds == 0:
            engine.step(items(seed=rounds))
        else:
            engine.evaluate(items(seed=rounds))
        rounds += 1
        if rounds == 3:
            here("working")
    path = engine.save(folder)
    assert path is not None
    here(path.name)
    engine.close()


def survivor(dp: int, pp: int, folder: str, steps: int, deaths: int, keep: int = 2) -> dict[str, str]:
    """Train through SIGKILLs at random moments: each life but the last ends with one of a random rank."""
    engine = small(dp, pp, depth=6)
    restored = engine.resume(folder)
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    draw = random.Random(life)
    victim, moment = draw.randrange(dp * pp), draw.uniform(0.3, 1.5)
    if life < deaths and rank() == victim:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while engine.steps < steps:
        engine.step(items(seed=engine.steps))
        if engine.steps % 3 == 0:
            engine.save(folder, background=engine.steps % 2 == 0, keep=keep)
        if life < deaths:
            time.sleep(0.02)  # or it would be through before its death
    engine.saved()
    weights = engine.full_state_dict()
    engine.close()
    assert life == deaths, "it was through before its death"
    return {name: digest(tensor) for name, tensor in weights.items()} | {
        "from": str(restored.step if restored is not None else 0)
    }
