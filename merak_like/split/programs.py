"""What one side runs for a micro-batch of a given shape: its own stages, and those that stand for the other side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from merak_like.partitioner.schedules.action import Edges
from merak_like.partitioner.tracer import LossFn, trace
from merak_like.runtime import rng
from merak_like.runtime.batches import signature
from merak_like.runtime.links import Spec
from merak_like.runtime.programs import KEPT, Program
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stage
from merak_like.runtime.value_code import ValueCode, value_code
from merak_like.split.cut import Cut
from merak_like.split.elsewhere import Arrives, Leaves, Shown
from merak_like.split.exchange import Exchange
from merak_like.split.halves import Halves, halve

Side = Literal["edge", "host"]
EDGE, HOST = {0: 0, 2: 3}, {1: 1}
"""Part of the model (head, cloud's half, tail) -> the stage of an engine that runs it."""


@dataclass(frozen=True)
class Half(Program):
    """One side's program for a shape."""

    halves: Halves = field(kw_only=True)

    @property
    def shown(self) -> Shown | None:
        """The stage that makes the model's outputs, if it is on this side."""
        return next((s for s in self.stages.values() if isinstance(s, Shown) and "loss" in s.code.results), None)


class HalfPrograms:
    """One side's programs by input shape and mode."""

    def __init__(
        self, side: Side, model: nn.Module, cut: Cut, exchange: Exchange, device: torch.device, loss_fn: LossFn | None
    ) -> None:
        self.side: Side = side
        self.model, self.cut, self.exchange = model, cut, exchange
        self.device, self.loss_fn = device, loss_fn
        self._known: dict[Any, list[Half]] = {}

    def at(self, batch: Any) -> Half:
        """The program for a micro-batch like this one, in the model's present mode."""
        key = (signature(batch), self.model.training)
        if key in self._known:
            self._known[key] = self._known.pop(key)
        for half in self._known.get(key, ()):
            if half.traced.fits(batch):
                return half
        made = self._half(halve(trace(self.model, batch, self.loss_fn, device=self.device), self.cut))
        if len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known.setdefault(key, []).append(made)
        return made

    def edges(self) -> Edges:
        """Neighbours talk, whatever the shape."""
        count = stage_count(self.side, self.cut)
        return frozenset((s, s + 1) for s in range(count - 1))

    def _half(self, halves: Halves) -> Half:
        edges: dict[tuple[int, int], tuple[Spec, ...]] = dict.fromkeys(self.edges(), ())
        stages: dict[int, Any]
        if self.side == "edge":
            stages = {0: self._own(halves, 0), 1: Leaves(self.exchange, "up", halves.sent)}
            edges[0, 1] = halves.sent
            if halves.tailed:
                names = [spec.name for spec in halves.returned]
                stages |= {2: Arrives(self.exchange, "down", halves.returned, names), 3: self._own(halves, 2)}
                edges[2, 3] = halves.returned
                if halves.kept:
                    edges[0, 3] = halves.kept
        else:
            names = [spec.name for spec in (*halves.sent, *halves.rebuilt)]
            code = value_code(halves.trace, self.model, [s.name for s in halves.rebuilt], halves.starts[1])
            again = _Again(code, self.device) if halves.rebuilt else None
            stages = {0: Arrives(self.exchange, "up", halves.sent, names, again), 1: self._own(halves, 1)}
            edges[0, 1] = (*halves.sent, *halves.rebuilt)
            if halves.tailed:
                stages[2] = Leaves(self.exchange, "down", halves.returned)
                edges[1, 2] = halves.returned
        drawing = any(op.random for op in halves.trace.graph.ops)
        if drawing:
            state = Spec(rng.RNG, tuple(rng.state(self.device).shape), torch.uint8, False)
            for edge in self.edges():
                edges[edge] = (*edges[edge], state)
        return Half(stages, edges, halves.trace, halves.trace.fits, drawing, halves=halves)

    def _own(self, halves: Halves, part: int) -> Stage:
        code = build_stage(halves.trace, self.model, halves.starts, part)
        return Shown(code, halves.trace.inputs, self.device, Counter[int]())


@dataclass(frozen=True)
class _Again:
    code: ValueCode
    device: torch.device

    def __call__(self, batch: Any) -> Mapping[str, torch.Tensor]:
        return self.code(batch, self.device)


def stage_count(side: Side, cut: Cut) -> int:
    """How many stages an engine of this side has."""
    tailed = cut.back is not None
    return {"edge": 4 if tailed else 2, "host": 3 if tailed else 2}[side]


def own_parts(side: Side, cut: Cut) -> Mapping[int, int]:
    """Parts of the model that a side has, and the stages that run them."""
    return HOST if side == "host" else EDGE if cut.back is not None else {0: 0}


def order(side: Side, cut: Cut, micro_batches: int, window: int) -> str:
    """A side's computations in a step: ``window`` micro-batches are on their way before the first comes back.

    The edge asks for a micro-batch's gradient one micro-batch later than it could, so that the way back and the cloud's
    work are behind its own.
    """
    first = min(window, micro_batches)
    out, back = _ways(side, cut)
    words = [f"F{i}.{stage}" for i in range(first) for stage in out[0]]
    late = 1 if side == "edge" else 0
    for i in range(micro_batches + late):
        if i < micro_batches:
            words += [f"F{i}.{stage}" for stage in out[1]] + [f"B{i}.{stage}" for stage in back[0]]
            if i + first < micro_batches:
                words += [f"F{i + first}.{stage}" for stage in out[0]]
        if i >= late:
            words += [f"B{i - late}.{stage}" for stage in back[1]]
    return " ".join(words)


def _ways(side: Side, cut: Cut) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """Forward stages before and after the other side's turn; backward stages likewise."""
    if side == "host":
        stages = range(stage_count(side, cut))
        return (stages, ()), ((), tuple(reversed(stages)))
    if cut.back is not None:
        return ((0, 1), (2, 3)), ((3, 2), (1, 0))
    return ((0, 1), ()), ((), (1, 0))
