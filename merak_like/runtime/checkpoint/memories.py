"""What links remember of samples, in a checkpoint: once for both ends of an edge, which remember the same.

    memories.LAYOUT.DP.TP.SOURCE.TARGET.PLACE.NAME      LAYOUT stands for the codec, the mesh and the cuts

Another layout sends other values between other ranks, and replicas see other samples: there nothing of it serves, and
all begin with first visits, which are exact.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from merak_like.partitioner.plan import Plan
from merak_like.runtime.checkpoint.boxes import Held, Part
from merak_like.runtime.groups import Groups

KIND = "memories"


@runtime_checkable
class Remembering(Protocol):
    """Links that remember something from step to step."""

    text: str
    """What is remembered depends on it."""

    def state_dict(self) -> dict[str, Tensor]:
        """By edge: SOURCE.TARGET. and what the links like."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from it; what is not in it is forgotten."""
        ...


class Memories:
    """One rank's part of what the links of a job remember; none where they do not."""

    def __init__(self, links: object, plan: Plan, groups: Groups) -> None:
        self.links = links if isinstance(links, Remembering) else None
        self._own = {stage.index for stage in plan.stages if stage.rank == groups.coord.pp}
        self._found: dict[str, Tensor] = {}
        text = "" if self.links is None else self.links.text
        cuts = f"{text}/{plan.mesh}/{[*plan.starts]}/{[*plan.stage_rank]}"
        self._layout = f"{KIND}.{hashlib.sha256(cuts.encode()).hexdigest()[:16]}."
        self._here = f"{self._layout}{groups.coord.dp}.{groups.coord.tp}."

    def written(self) -> list[Held]:
        """Copies of it. Both ends of an edge have the same entries, of which the first rank's are written."""
        state = {} if self.links is None else self.links.state_dict()
        return [_held(self._here + name, tensor) for name, tensor in state.items()]

    def wanted(self, entries: Mapping[str, tuple[Any, torch.dtype]]) -> list[Held]:
        """Room for what a checkpoint has for this rank."""
        self._found = {}
        for key, (shape, dtype) in entries.items() if self.links is not None else ():
            if key.startswith(self._here):
                name = key.removeprefix(self._here)
                if self._own & {int(stage) for stage in name.split(".")[:2]}:
                    self._found[name] = torch.empty(shape, dtype=dtype)
        return [_held(self._here + name, tensor) for name, tensor in self._found.items()]

    def adopt(self, entries: Mapping[str, Any], *, lead: bool) -> None:
        """Go on with what was read. ``lead`` tells where a checkpoint's memories are of another layout."""
        if self.links is None:
            return
        self.links.load_state_dict(self._found)
        self._found = {}
        there = [key for key in entries if key.startswith(f"{KIND}.")]
        if lead and there and not any(key.startswith(self._layout) for key in there):
            warnings.warn(
                f"the checkpoint's memories of samples are of another codec or layout than {self.links.text} here: "
                "each sample's next visit is a first one, sent whole",
                stacklevel=2,
            )


def _held(key: str, tensor: Tensor) -> Held:
    return Held(key, tuple(tensor.shape), (Part((0,) * tensor.dim(), tensor),))
