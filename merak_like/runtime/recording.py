"""What a step really did: when each action of each rank ran, and how long it waited for another rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch

from merak_like.partitioner.recorded import Record, Recorded
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime import collect
from merak_like.runtime.initialize import World
from merak_like.runtime.watch import Watch

if TYPE_CHECKING:
    from merak_like.runtime.engine import Engine

Do = Mapping[Kind, Callable[[Action], object]]


class Recorder:
    """Times the actions of one rank, step by step. On an accelerator each is waited for, so nothing overlaps there."""

    def __init__(self, world: World, watch: Watch) -> None:
        self._world, self._watch = world, watch
        self._begun = 0.0
        self._records: list[list[Record]] = []
        self._now_in: list[Record] = []
        """Where records go: those between steps, of an evaluation, nowhere."""
        self._tails: list[float] = []

    def timed(self, do: Do) -> Do:
        """The same actions, recorded."""
        return {kind: self._timed(one) for kind, one in do.items()}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step: all ranks set their clocks together."""
        collect.barrier(self._world, self._watch)
        self._begun, self._now_in = time.perf_counter(), []
        yield
        self._records.append(self._now_in)
        self._tails.append(self._now())
        self._now_in = []

    def recorded(self, plan: str) -> Recorded | None:
        """The steps of all ranks, on rank 0; every rank must ask."""
        ranks = collect.to_first((self._records, self._tails), self._world, self._watch)
        if not ranks:
            return None
        steps = tuple(tuple(tuple(rank[0][i]) for rank in ranks) for i in range(len(self._tails)))
        return Recorded(plan, steps, tuple(tuple(rank[1][i] for rank in ranks) for i in range(len(self._tails))))

    def _timed(self, do: Callable[[Action], object]) -> Callable[[Action], object]:
        def timed(action: Action) -> object:
            start, waited = self._now(), self._watch.waited
            made = do(action)
            end = self._now()
            self._now_in.append(Record(action, start, end, min(self._watch.waited - waited, end - start)))
            return made

        return timed

    def _now(self) -> float:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter() - self._begun


class Profile:
    """What ``engine.profile()`` gives: after the block, ``recorded`` holds the steps on rank 0 (None elsewhere)."""

    recorded: Recorded | None = None

    def save(self, path: str) -> None:
        """Write the profile for ``merak timeline plan.json --measured path``; only rank 0 writes."""
        if self.recorded is not None:
            self.recorded.save(path)


class Observed:
    """The part of an engine that lets others see its actions, and do something around each."""

    _do: Do
    _around_step: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def doing(self, by: Callable[[Do], Do]) -> Iterator[None]:
        """Inside, actions are done by what ``by`` makes of those that do them."""
        before, self._do = self._do, by(self._do)
        try:
            yield
        finally:
            self._do = before

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Record when each action of the training steps inside runs, and what it waits for. Every rank enters.

        After the block ``.recorded`` holds the steps, on rank 0, and ``.save(path)`` writes them there:
        ``merak timeline plan.json --measured path`` draws them below the planned step.
        """
        engine = cast("Engine", self)  # which it is a part of
        engine._open()
        found, recorder = Profile(), Recorder(engine.world, engine._watch)
        self._around_step = recorder.step
        try:
            with self.doing(recorder.timed):
                yield found
        finally:
            self._around_step = nullcontext
        found.recorded = recorder.recorded(engine.plan.digest)
