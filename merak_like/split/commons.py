"""The weights of a host's groups, on each rank its part, and the halves that learn them together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.links import NoLinks
from merak_like.runtime.optimizer import StepResult, Update
from merak_like.split.common import Common, Part
from merak_like.split.crew import Crew
from merak_like.split.exchange import Exchange
from merak_like.split.groups import GroupText
from merak_like.split.half import Brief, Made, Source, build_half
from merak_like.split.masked import Masked
from merak_like.split.messages import Task
from merak_like.split.training import Training


class Contributes(Update):
    """An update that changes nothing here: the gradients are kept for whoever puts them together."""

    gradients: Mapping[str, Tensor]

    def apply(self, found: StepResult, step: int, blame: Any) -> StepResult:
        """Refuse what is not finite, clip, and keep."""
        result = super().apply(found, step, blame)
        self.gradients = {slot.name: slot.target.grad for slot in self.slots if slot.target.grad is not None}
        return result


class Commons:
    """Shared weights by group."""

    def __init__(self, source: Source, crew: Crew, device: torch.device) -> None:
        self.source, self.crew, self.device = source, crew, device
        self.known: dict[str, Common] = {}
        """Of the groups that have had a session."""

    def build(self, name: str, text: GroupText, task: Task, example: Any, exchange: Exchange) -> Made:
        """A half whose weights are a group's; with the first one the weights. Every rank builds its part.

        Raises ValueError for a half that would train other weights.
        """
        build = partial(
            build_half, "host", self.source, example=example, links=NoLinks(), optimizer=None, device=self.device,
            crew=self.crew,
        )  # fmt: skip
        if name not in self.known:
            seeded = task.model_copy(update={"seed": text.seed, "frozen_edge": False, "local": None})
            bare = partial(build, task=seeded, exchange=Exchange({}, 0, self.device))
            kind = Masked if text.mode == "chosen" else Common
            self.known[name] = kind(self.crew.each(bare), text, self.crew)
        common = self.known[name]
        learn = partial(_contributes, text)
        made = build(task=task, exchange=exchange, shared=common.seen_by_one(), learn=learn)
        if set(made.trained) != set(common.trained):
            odd = sorted(set(made.trained) ^ set(common.trained))[:3]
            raise ValueError(f"this session would train other weights than group {name}: {odd}; is skip the same?")
        return made


def _contributes(text: GroupText, slots: Any, answers: Any) -> Contributes:
    return Contributes(slots, None, max_grad_norm=text.max_grad_norm, guard=Brief(), answers=answers)


def brought(training: Training, items: int, session: str = "", member: str = "", loss: float = 0.0) -> Part:
    """What a half has found in a step, on this rank."""
    update = training.made.update
    assert isinstance(update, Contributes)
    return Part(update.gradients, training.buffers(), items, session, member, loss)
