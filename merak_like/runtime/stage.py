"""A stage at work: its code, and the micro-batches that are between their forward and their backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer.example import leaves
from merak_like.runtime.stage_code import StageCode, current_state, set_state


@dataclass
class Live:
    """What a micro-batch leaves behind in its forward for its backward."""

    received: Mapping[str, Tensor]
    made: Mapping[str, Tensor]


class Stage:
    """Runs forwards and backwards of micro-batches; gradients add up in the parameters' ``grad``."""

    def __init__(self, code: StageCode, inputs: Mapping[str, tuple[Any, ...]], device: torch.device) -> None:
        self.code, self.device = code, device
        self.paths = {name: inputs[name] for name in code.inputs}
        self.live: dict[int, Live] = {}

    def forward(self, micro_batch: int, batch: Any, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch; the values made, by name, detached. Values must arrive under the names of the plan.

        A received value that needs a gradient must say so by its ``requires_grad``.
        """
        found = leaves(batch) if self.paths else {}
        mine = [found[path].to(self.device) for path in self.paths.values()]
        grads = torch.is_grad_enabled()
        boundary = {
            name: received[name].detach().requires_grad_(grads and received[name].requires_grad)
            for name in self.code.received
        }
        state = current_state(self.device.type)
        try:
            made = self.code.module(*mine, *boundary.values())
        finally:
            set_state(self.device.type, state)
        named = dict(zip((*self.code.sent, *self.code.results), made, strict=True))
        if grads:
            self.live[micro_batch] = Live(boundary, named)
        return {name: value.detach().requires_grad_(value.requires_grad) for name, value in named.items()}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch backward from the gradients of what it made; the gradients of what it received."""
        live = self.live.pop(micro_batch)
        roots = [(live.made[n], g) for n, g in gradients.items() if live.made[n].requires_grad]
        if roots:
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])
        return {name: t.grad for name, t in live.received.items() if t.grad is not None}
