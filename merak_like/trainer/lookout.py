"""What a run can watch itself with: torch's profiler over some steps, a snapshot of a GPU's memory, and whether ranks
that hold the same weights still do.

run/profile/rank-0.json      a trace for ui.perfetto.dev, one a rank
            rank-0.memory    what was allocated where, for pytorch.org/memory_viz; of a GPU
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from merak_like._compat import dump_memory, record_memory
from merak_like.runtime import collect
from merak_like.runtime.engine import Engine
from merak_like.trainer.listeners import Events
from merak_like.trainer.settings import Profile, Settings
from merak_like.trainer.state import Control, State


class Profiling:
    """Records some steps of this rank, and writes them when the last of them is done."""

    def __init__(self, asked: Profile, engine: Engine, folder: Path) -> None:
        self._asked, self._engine, self._folder = asked, engine, folder
        self._begun: int | None = None
        """The steps that this process had seen when the recording began."""
        self._seen = 0
        self._running: Any = None

    def step_begin(self) -> None:
        """Begin, if this is the step."""
        self._seen += 1
        if self._seen != self._asked.at:
            return
        device, kinds = self._engine.world.device, [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
            record_memory("all")
        self._running = profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._running.start()

    def step_end(self) -> None:
        """Write, if it was the last."""
        if self._seen == self._asked.at + self._asked.steps - 1:
            self.end()

    def end(self) -> None:
        """Write what there is."""
        if self._running is None:
            return
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"rank-{self._engine.world.rank}"
        self._running.export_chrome_trace(str(name.with_suffix(".json")))
        if self._engine.world.device.type == "cuda":
            dump_memory(name.with_suffix(".memory"))
            record_memory("state")
        self._running = None


class Lookout:
    """Hears what happens before those who were given to it, and tells them."""

    def __init__(self, inner: Events, args: Settings, engine: Engine) -> None:
        self._inner, self._engine, self._every = inner, engine, args.training.check_every
        asked = args.logging.profile
        self._profiling = None if asked is None else Profiling(asked, engine, args.folder / "profile")
        if engine.world.device.type == "cuda":
            record_memory("state")  # should memory end, the snapshot tells which lines have it (see shortage.py)

    def fire(self, event: str, state: State, control: Control, **more: Any) -> None:
        """Look, and tell the others. Raises RuntimeError where ranks have come apart."""
        if self._profiling is not None:
            act = {"step_begin": "step_begin", "optimizer_step": "step_end", "train_end": "end"}.get(event)
            if act is not None:
                getattr(self._profiling, act)()
        if event == "step_end" and self._every is not None and state.step % self._every == 0:
            check(self._engine, state.step)
        self._inner.fire(event, state, control, **more)

    def state_dict(self) -> dict[str, Any]:
        """What the others must remember."""
        return self._inner.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Remind them."""
        self._inner.load_state_dict(saved)


@torch.no_grad()
def check(engine: Engine, step: int) -> None:
    """Raise RuntimeError on every rank, naming the odd ones, where ranks that hold the same weights differ in a bit.

    Every rank calls. Of weights spread by zero=3 nobody else has the same rows.
    """
    own = {engine._shards.label(name): p for name, p in engine._parameters.items() if type(p) is torch.nn.Parameter}
    if theirs := collect.odd_weights(own, engine.world, engine._watch):
        raise RuntimeError(
            f"after step {step} the ranks do not hold the same weights: {theirs}: a memory, a link or code that runs "
            "on one rank only has changed them; go on from the checkpoint before"
        )
