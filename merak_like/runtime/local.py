"""All stages in one process: the proof that a cut graph computes what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tracer import Trace
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stages


class LocalPipeline:
    """The stages of one model, run one after the other with detached boundaries. Gradients land in the model."""

    def __init__(self, trace: Trace, model: nn.Module, starts: Sequence[int]) -> None:
        self.stages = [Stage(code, trace.inputs, trace.device) for code in build_stages(trace, model, starts)]

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Forward through every stage, then backward from the loss; the model's outputs by name, with ``loss``."""
        values: dict[str, Tensor] = {}
        for stage in self.stages:
            values.update(stage.forward(0, batch, values))
        gradients: dict[str, Tensor] = {"loss": torch.ones_like(values["loss"])}
        for stage in reversed(self.stages):
            made = {*stage.code.sent, *stage.code.results}
            for name, gradient in stage.backward(0, {n: g for n, g in gradients.items() if n in made}).items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return values
