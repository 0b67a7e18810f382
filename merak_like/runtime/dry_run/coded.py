"""Links of a dry run that carry what a codec would make of values: as many bytes, without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merak_like.partitioner.schedules.action import Action
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.wire import Layout
from merak_like.runtime.coded_links import coded, direction, wires
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
        self.links.post(action, wires(specs, self._nbytes(action, specs)))

    def take(self, action: Action) -> dict[str, Tensor]:
        """As ``Links``."""
        found, specs = self.links.take(action), self._awaited.pop(action)
        return found | {spec.name: self._empty(spec) for spec, _ in coded(action, specs)}

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """As ``Links``."""
        nbytes = self._nbytes(action, specs)
        sent = wires(specs, nbytes)
        self.links.send(action, sent, {**values, **{s.name: self._empty(s) for s in sent if s.name in nbytes}})

    def flush(self) -> None:
        """As ``Links``."""
        self.links.flush()

    def _nbytes(self, action: Action, specs: Sequence[Spec]) -> dict[str, int]:
        context = Context(direction=direction(action))
        packed = {s.name: self._codec.packed(Layout(s.shape, s.dtype), context) for s, _ in coded(action, specs)}
        return {name: body.nbytes + side for name, (body, side) in packed.items()}

    def _empty(self, spec: Spec) -> Tensor:
        with self.links.mode:
            made = torch.empty(spec.shape, dtype=spec.dtype, device=self.links.device)
        return made.requires_grad_(spec.requires_grad)
