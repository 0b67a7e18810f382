"""Stages, programs and links of a dry run: the engine's own, on tensors that have shapes and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merak_like._compat import FakeTensorMode
from merak_like.partitioner.schedules.action import Action, Edges
from merak_like.runtime import rng
from merak_like.runtime.batches import signature
from merak_like.runtime.dry_run.echo import Call, Echo, call_again, calls_of
from merak_like.runtime.links import DistLinks, Spec
from merak_like.runtime.programs import Program, Programs


class Real(NamedTuple):
    """The micro-batches of a stage whose backward is run: the first, and the one that is done with last."""

    first: int
    last: int
    put_off: bool
    """Of the last."""


class OnceStage:
    """A stage that runs few micro-batches; the others are alike, and get what these made.

    Without calls inside, one is enough: its forward is run when the first comes, its backward when the last does, so
    that gradient buckets go out as they would. What a stage calls inside, in ``talks``, is heard from the first and
    the last backward, and repeated for those between.
    """

    def __init__(self, stage: Any, example: Any, mode: FakeTensorMode, real: Real, talks: Sequence[Echo]) -> None:
        self.code = stage.code
        self._stage, self._example, self._mode, self._real, self._talks = stage, example, mode, real, talks
        self._made: dict[str, Tensor] = {}
        self._returns: dict[str, Tensor] = {}
        """A gradient for each value received that needs one; whether a value gets one the last backward says."""
        self._calls: dict[str, tuple[Call, ...]] = {}

    def _run(self, what: str, work: Callable[[], Any]) -> Any:
        with self._mode:
            given, self._calls[what] = calls_of(self._talks, work)
        return given

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """As ``Stage``."""
        real, begins = self._real, not self._made
        if begins or (self._talks and micro_batch in (real.first, real.last)):
            at, later = (micro_batch, put_off) if self._talks else (real.last, real.put_off)
            work = partial(self._stage.forward, at, self._example, received, put_off=later)
            self._made = self._run("forward", work)
            live = self._stage.live[at]
            self._returns = {name: value.detach() for name, value in live.received.items() if value.requires_grad}
            if at not in (real.first, real.last):
                del self._stage.live[at]
        else:
            call_again(self._calls.get("forward", ()))
        return dict(self._made)

    def recompute(self, micro_batch: int) -> None:
        """As ``Stage``."""
        if micro_batch in self._stage.live:
            self._run("recompute", partial(self._stage.recompute, micro_batch))
        else:
            call_again(self._calls.get("recompute", ()))

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``Stage``."""
        if micro_batch in self._stage.live:
            return self._run("backward", partial(self._stage.backward, micro_batch, gradients))
        call_again(self._calls.get("backward", ()))
        return dict(self._returns)

    def weight(self, micro_batch: int) -> None:
        """As ``Stage``."""
        if micro_batch in self._stage.waiting:
            self._run("weight", partial(self._stage.weight, micro_batch))
        else:
            call_again(self._calls.get("weight", ()))


class OnePrograms:
    """The program of the plan's micro-batch, for every micro-batch."""

    def __init__(
        self, programs: Programs, example: Any, mode: FakeTensorMode, real: Mapping[int, Real], talks: Sequence[Echo]
    ) -> None:
        """``real`` are the micro-batches that the stages run, ``talks`` the groups that are called inside stages."""
        self._programs, self._key = programs, signature(example)
        program = programs.at(example)
        stages: dict[int, Any] = {
            at: OnceStage(stage, example, mode, real[at], talks) for at, stage in program.stages.items()
        }
        self._program: Program = replace(program, stages=stages)

    def at(self, batch: Any) -> Program:
        """Raises ValueError for a micro-batch of another shape than the plan's."""
        if signature(batch) != self._key:
            raise ValueError(f"a micro-batch has the shape {signature(batch)}, the plan's has {self._key}")
        return self._program

    def edges(self) -> Edges:
        """As ``Programs``."""
        return self._programs.edges()


class ShapeLinks(DistLinks):
    """Links whose buffers have no data; a random state that arrives is this process's own."""

    mode: FakeTensorMode

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        with self.mode:
            super().post(action, specs)

    def take(self, action: Action) -> dict[str, Tensor]:
        found = super().take(action)
        if rng.RNG in found:
            assert found[rng.RNG].shape == rng.state(torch.device("cpu")).shape, "a random state is as long as another"
            found[rng.RNG] = rng.state(torch.device("cpu"))
        return found
