"""Halves of adapters alone: all their other weights are the trunk's, which is there once, on each rank its part."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from merak_like.runtime.links import NoLinks
from merak_like.split.crew import Crew
from merak_like.split.exchange import Exchange
from merak_like.split.half import Made, Source, build_half
from merak_like.split.joined import Pool
from merak_like.split.messages import Task
from merak_like.split.training import optimizer_of


class Trunk:
    """The frozen weights of all sessions that train adapters."""

    def __init__(self, source: Source, crew: Crew, device: torch.device, pool: Pool | None = None) -> None:
        """``pool`` lets micro-batches of several sessions go through at once."""
        self.source, self.crew, self.device, self.pool = source, crew, device, pool
        self.weights: Mapping[str, nn.Parameter] | None = None
        """Once there is a session."""

    def build(self, task: Task, example: Any, exchange: Exchange) -> Made:
        """A session's half; with the first one the trunk's weights."""
        build = partial(
            build_half, "host", self.source, example=example, links=NoLinks(), device=self.device, crew=self.crew
        )
        if self.weights is None:
            plain = task.model_copy(update={"lora": None, "seed": 0})
            bare = partial(build, task=plain, exchange=Exchange({}, 0, self.device), optimizer=None)
            whole = self.crew.each(bare)  # on all ranks or on none
            named = dict(whole.model.named_parameters())
            self.weights = {name: named[name] for name in whole.own if name in named}
        return build(
            task=task, exchange=exchange, optimizer=optimizer_of(task.optimizer), shared=self.weights, pool=self.pool
        )
