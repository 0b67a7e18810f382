"""Stages, programs and links of a dry run: the engine's own, on tensors that have shapes and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merak_like._compat import FakeTensorMode
from merak_like.partitioner.schedules.action import Action, Edges
from merak_like.runtime import rng
from merak_like.runtime.batches import signature
from merak_like.runtime.links import DistLinks, Spec
from merak_like.runtime.programs import Program, Programs
from merak_like.runtime.stage import Stage


class Real(NamedTuple):
    """The micro-batch of a stage that is run: the one that is done with last, so that buckets go out as they would."""

    micro_batch: int
    put_off: bool


class OnceStage:
    """A stage that runs one micro-batch; the others are alike, and get what that one made.

    Its forward is run when the first comes, its backward when the last does.
    """

    def __init__(self, stage: Stage, example: Any, mode: FakeTensorMode, real: Real) -> None:
        self.code = stage.code
        self._stage, self._example, self._mode, self._real = stage, example, mode, real
        self._made: dict[str, Tensor] = {}
        self._returns: dict[str, Tensor] = {}
        """A gradient for each value received that needs one; whether a value gets one the last backward says."""

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """As ``Stage``."""
        if not self._made:
            with self._mode:
                self._made = self._stage.forward(
                    self._real.micro_batch, self._example, received, put_off=self._real.put_off
                )
            live = self._stage.live[self._real.micro_batch]
            self._returns = {name: value.detach() for name, value in live.received.items() if value.requires_grad}
        return dict(self._made)

    def recompute(self, micro_batch: int) -> None:
        """As ``Stage``."""
        if micro_batch == self._real.micro_batch:
            with self._mode:
                self._stage.recompute(micro_batch)

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``Stage``."""
        if micro_batch != self._real.micro_batch:
            return dict(self._returns)
        with self._mode:
            return self._stage.backward(micro_batch, gradients)

    def weight(self, micro_batch: int) -> None:
        """As ``Stage``."""
        if micro_batch == self._real.micro_batch:
            with self._mode:
                self._stage.weight(micro_batch)


class OnePrograms:
    """The program of the plan's micro-batch, for every micro-batch."""

    def __init__(self, programs: Programs, example: Any, mode: FakeTensorMode, real: Mapping[int, Real]) -> None:
        """``real`` are the micro-batches that the stages run."""
        self._programs, self._key = programs, signature(example)
        program = programs.at(example)
        stages: dict[int, Any] = {at: OnceStage(stage, example, mode, real[at]) for at, stage in program.stages.items()}
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
