"""Transfers between stages: asynchronous point-to-point, in the order the schedule fixed.

A receive is posted into a fresh buffer and waited for where its value is used; a send is started and its tensors are
kept until it is through. Shapes are known on both sides from the trace, so no header travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.schedules.action import Action
from merak_like.runtime.groups import Groups
from merak_like.runtime.watch import Watch


class Spec(NamedTuple):
    """What a transfer carries for one value."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Links(Protocol):
    """How a rank's stages talk to the stages elsewhere."""

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        """Start receiving what ``action`` (a RECV) names."""
        ...

    def take(self, action: Action) -> dict[str, Tensor]:
        """Wait for a posted receive; its values by name."""
        ...

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """Start sending what ``action`` (a SEND) names: of the values those in ``specs``, in that order."""
        ...

    def flush(self) -> None:
        """Wait until every started send is through."""
        ...


class DistLinks:
    """Links over torch.distributed."""

    def __init__(self, groups: Groups, watch: Watch, device: torch.device) -> None:
        self.groups, self.watch, self.device = groups, watch, device
        self._posted: dict[Action, list[tuple[Spec, Tensor, Any]]] = {}
        self._sending: list[tuple[Action, Tensor, Any]] = []

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        peer = self.groups.rank_of(action.peer)
        group = self.groups.from_(action.peer)
        posted = []
        for spec in specs:
            buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
            posted.append((spec, buffer, self._start(dist.irecv, buffer, peer, group, action)))
        self._posted[action] = posted

    def take(self, action: Action) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for spec, buffer, work in self._posted.pop(action):
            self.watch.wait(work, spec.name, "of", action, "from rank", self.groups.rank_of(action.peer))
            found[spec.name] = buffer.requires_grad_() if spec.requires_grad else buffer
        return found

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        self._sending = [item for item in self._sending if not item[2].is_completed()]
        peer = self.groups.rank_of(action.peer)
        group = self.groups.towards(action.peer)
        for spec in specs:
            tensor = values[spec.name].detach().contiguous()
            self._sending.append((action, tensor, self._start(dist.isend, tensor, peer, group, action)))

    def flush(self) -> None:
        for action, _, work in self._sending:
            self.watch.wait(work, "the end of", action, "to rank", self.groups.rank_of(action.peer))
        self._sending.clear()
        assert not self._posted, f"receives nobody used: {list(self._posted)}"

    def _start(self, start: Any, tensor: Tensor, peer: int, group: Any, action: Action) -> Any:
        with self.watch.waiting("the start of", action, "with rank", peer):
            return start(tensor, peer, group=group)


class NoLinks:
    """For a pipeline of one rank: there is nobody to talk to."""

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        raise AssertionError(f"{action} on a pipeline of one rank")

    def take(self, action: Action) -> dict[str, Tensor]:
        raise AssertionError(f"{action} on a pipeline of one rank")

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        raise AssertionError(f"{action} on a pipeline of one rank")

    def flush(self) -> None:
        """Nothing is under way."""
