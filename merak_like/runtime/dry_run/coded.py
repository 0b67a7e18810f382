"""Links of a dry run that carry what a codec would make of values: as many bytes, without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merak_like.partitioner.schedules.action import Action
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.wire import Layout
from merak_like.runtime.coded_links import FORWARD, coded
from merak_like.runtime.dry_run.stages import ShapeLinks
from merak_like.runtime.links import Spec


class CodedShapes:
    """As ``CodedLinks``; of a codec that remembers samples, what goes at later visits."""

    def __init__(self, links: ShapeLinks, text: str) -> None:
        self.links, self._codec = links, codec(text)
        self._awaited: dict[Action, Sequence[Spec]] = {}

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        """As ``Links``."""
        self._awaited[action] = specs
        self.links.post(action, [*self._wires(action, specs).values()])

    def take(self, action: Action) -> dict[str, Tensor]:
        """As ``Links``."""
        found, specs = self.links.take(action), self._awaited.pop(action)
        return found | {spec.name: self._empty(spec) for spec, _ in coded(action, specs)}

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """As ``Links``."""
        wires = self._wires(action, specs)
        sent = {spec.name: self._empty(wires[spec.name]) for spec, _ in coded(action, specs)}
        self.links.send(action, [*wires.values()], {**values, **sent})

    def flush(self) -> None:
        """As ``Links``."""
        self.links.flush()

    def _wires(self, action: Action, specs: Sequence[Spec]) -> dict[str, Spec]:
        context = Context(direction="forward" if action.kind in FORWARD else "backward")
        wires = {spec.name: spec for spec in specs}
        for spec, _ in coded(action, specs):
            body, side = self._codec.packed(Layout(spec.shape, spec.dtype), context)
            wires[spec.name] = Spec(spec.name, (body.nbytes + side,), torch.uint8, False)
        return wires

    def _empty(self, spec: Spec) -> Tensor:
        with self.links.mode:
            made = torch.empty(spec.shape, dtype=spec.dtype, device=self.links.device)
        return made.requires_grad_(spec.requires_grad)
