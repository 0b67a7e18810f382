"""A trace that a rank is ready to run: what crosses its borders, and the stages it becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.layout import Layout
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stage

Ranges = Collection[tuple[int, int]]


class StageCodeLike(Protocol):
    """Of a stage's code, what the engine looks at."""

    @property
    def received(self) -> tuple[str, ...]: ...
    @property
    def sent(self) -> tuple[str, ...]: ...
    @property
    def results(self) -> Collection[str]: ...


class StageLike(Protocol):
    """What runs the actions of one stage."""

    @property
    def code(self) -> StageCodeLike: ...
    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]: ...
    def recompute(self, micro_batch: int) -> None: ...
    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def weight(self, micro_batch: int) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """The trace as this rank runs it, and how its stages are made."""

    trace: Trace
    make: Callable[[int, Ranges, torch.device, Counter[int] | None], StageLike]
    """From a stage's index and the ranges of its ops that are computed again."""
    fits: Callable[[Any], bool]
    """Whether a micro-batch of the traced shape takes the traced way."""
    parts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    """How results lie of which a tensor-parallel rank has a part only, by their names."""

    @classmethod
    def plainly(
        cls, trace: Trace, model: nn.Module, starts: Sequence[int],
        keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Prepared:  # fmt: skip
        """A stage is its ops as code; ``keeping`` is as in ``Stage``."""

        def make(index: int, again: Ranges, device: torch.device, pending: Counter[int] | None) -> StageLike:
            return Stage(build_stage(trace, model, starts, index, again), trace.inputs, device, pending, keeping)

        return cls(trace, make, trace.fits)
