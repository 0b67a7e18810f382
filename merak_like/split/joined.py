"""Micro-batches of several sessions through one frozen trunk in one pass, each session's rows through its own adapters.

    ann  F3 ─┐ asks, and lets others compute           ┌─► her rows
    bob  F0 ─┤ asks                                    ├─► his rows
    eve      └ has the turn: one pass for all who ask ─┘

Nobody waits for others to ask: who gets the turn next runs the pass for all that have asked by then. A pass for several
keeps no activations; each backward runs the forward again, for whoever asks for that then. So a session that is lost
holds up no other. Sums differ from those of a pass alone by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from merak_like.runtime.batches import rows, signature
from merak_like.runtime.stage_code import StageCode
from merak_like.split.adapters import adapted, pass_of
from merak_like.split.elsewhere import Shown
from merak_like.split.turn import Turn

if TYPE_CHECKING:
    from merak_like.split.halves import Halves
    from merak_like.split.programs import HalfPrograms

PASS = -1
"""Where a stage keeps a pass for several."""
CARRIERS, KINDS = 16, 1024
"""Sets of adapted layers whose programs for several are kept; kinds of micro-batches that are known."""


class Unfit(ValueError):
    """These micro-batches cannot go together."""


class Alike(NamedTuple):
    """What micro-batches that go together have in common."""

    forward: bool
    learning: bool
    training: bool
    halves: str
    batch: Any
    layers: tuple[str, ...]
    received: tuple[bool, ...]
    """Which of the values come with a gradient to give back."""


@dataclass
class Ask:
    """What one session wants computed."""

    stage: Joined
    micro_batch: int
    batch: Any
    received: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None = None
    """Of what the stage makes, in a backward."""
    found: dict[str, Tensor] | None = None
    alone: bool = False
    """Whether it ran as a stage by itself does, and keeps its activations."""
    error: Exception | None = None

    @property
    def kind(self) -> Alike:
        """With whose it may go."""
        stage = self.stage
        flags = tuple(self.received[name].requires_grad for name in stage.code.received)
        return Alike(
            self.gradients is None, torch.is_grad_enabled(), stage.programs.model.training, stage.halves.digest,
            signature(self.batch), tuple(stage.layers), flags,
        )  # fmt: skip


class Pool:
    """Who asks now. It is used by whoever holds the turn, and by nobody else."""

    def __init__(self, turn: Turn, most: int) -> None:
        """``most`` sessions go together at most."""
        self.turn, self.most = turn, most
        self.sizes: list[int] = []
        """Sessions of the last passes."""
        self._waiting: list[tuple[Alike, Ask]] = []
        self._carriers: dict[tuple[str, ...], HalfPrograms] = {}
        self._proved: dict[Alike, bool] = {}
        """Whether rows have nothing to do with each other, by kind."""

    def through(self, ask: Ask) -> dict[str, Tensor]:
        """Have it computed, with others' or alone."""
        kind = ask.kind
        self._waiting.append((kind, ask))
        with self.turn.away():  # who is in line comes and asks
            pass
        if ask.found is None and ask.error is None:
            together = [ask, *(a for k, a in self._waiting if k == kind and a is not ask)][: self.most]
            self._waiting = [(k, a) for k, a in self._waiting if not any(a is one for one in together)]
            self._run(kind, together)
        if ask.error is not None:
            raise ask.error
        assert ask.found is not None
        return ask.found

    def _run(self, kind: Alike, asks: Sequence[Ask]) -> None:
        if len(self._proved) > KINDS:
            self._proved.clear()
        if len(asks) > 1 and self._proved.get(kind, True):
            try:
                found = self._joint(kind, asks)
                if asks[0].gradients is None and kind not in self._proved and not _same(found[0], asks[0]):
                    raise Unfit("rows of a batch have to do with each other in this model")
                self._proved[kind] = True
                for ask, one in zip(asks, found, strict=True):
                    ask.found = one
                self.sizes = [*self.sizes[-99:], len(asks)]
                return
            except Unfit:
                self._proved[kind] = False
        for ask in asks:
            try:
                ask.found, ask.alone = ask.stage.by_itself(ask), True
                self.sizes = [*self.sizes[-99:], 1]
            except Exception as error:  # is its session's
                ask.error = error

    def _joint(self, kind: Alike, asks: Sequence[Ask]) -> list[dict[str, Tensor]]:
        paths = kind.layers
        if paths not in self._carriers and len(self._carriers) >= CARRIERS:
            self._carriers.clear()
        programs = self._carriers.setdefault(paths, asks[0].stage.programs)
        counts = [rows(ask.batch) for ask in asks]
        batch = _joined([ask.batch for ask in asks], counts)
        mode = programs.model.training
        programs.model.train(kind.training)
        try:
            half = programs.at(batch)
            stage, values = half.stages[1], half.halves.trace.graph.values
            assert isinstance(stage, Joined)
            ins = [[a.received[n] for n in a.stage.code.received] for a in asks]
            if len(stage.code.received) != len(ins[0]) or len(stage.code.sent) != len(asks[0].stage.code.sent):
                raise Unfit("together they take another way through the model")
            received = {
                name: _cat(each, counts, values[name].shape)
                for name, each in zip(stage.code.received, zip(*ins, strict=True), strict=True)
            }
            with pass_of(stage.layers, [(n, ask.stage.layers) for n, ask in zip(counts, asks, strict=True)]):
                if asks[0].gradients is None:
                    return self._forward(asks, counts, stage, batch, received)
                return self._backward(asks, counts, stage, batch, received)
        finally:
            programs.model.train(mode)

    def _forward(
        self, asks: Sequence[Ask], counts: Sequence[int], stage: Shown, batch: Any, received: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            made = Shown.forward(stage, PASS, batch, received)
        found: list[dict[str, Tensor]] = [{} for _ in asks]
        for place, name in enumerate(stage.code.sent):
            if not made[name].dim() or made[name].shape[0] != sum(counts):
                raise Unfit(f"{name} has no row for each sample")
            for ask, one, part in zip(asks, found, made[name].split(list(counts)), strict=True):
                one[ask.stage.code.sent[place]] = part
        return found

    def _backward(
        self, asks: Sequence[Ask], counts: Sequence[int], stage: Shown, batch: Any, received: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        with torch.enable_grad():
            made = Shown.forward(stage, PASS, batch, received)
        gradients: dict[str, Tensor] = {}
        for place, name in enumerate(stage.code.sent):
            each = [(ask.gradients or {}).get(ask.stage.code.sent[place]) for ask in asks]
            if any(g is not None for g in each):
                blank = [x.detach().new_zeros(x.shape) for x in made[name].split(list(counts))]
                gradients[name] = torch.cat([b if g is None else g for g, b in zip(each, blank, strict=True)])
        back = Shown.backward(stage, PASS, gradients)
        found: list[dict[str, Tensor]] = [{} for _ in asks]
        for place, name in enumerate(stage.code.received):
            if name in back:
                for ask, one, part in zip(asks, found, back[name].split(list(counts)), strict=True):
                    one[ask.stage.code.received[place]] = part
        return found


def joinable(halves: Halves) -> bool:
    """Whether rows of the cloud's half may go with others': it draws nothing, and changes nothing but what it makes."""
    ops = halves.trace.graph.ops[halves.starts[1] : halves.starts[2]]
    buffers = {p.name for p in halves.trace.graph.parameters if p.buffer}
    return halves.tailed and not any(op.random or buffers & set(op.mutates) for op in ops)


class Joined(Shown):
    """A trunk's stage whose micro-batches may go through with those of other sessions."""

    def __init__(
        self, code: StageCode, inputs: Mapping[str, tuple[Any, ...]], device: torch.device, programs: HalfPrograms,
        halves: Halves, pool: Pool,
    ) -> None:  # fmt: skip
        """``halves`` are ``joinable``; ``programs`` make what several sessions run together."""
        super().__init__(code, inputs, device)
        self.programs, self.halves, self.pool = programs, halves, pool
        self.layers = adapted(programs.model)
        self.held: dict[int, tuple[Any, Mapping[str, Tensor]]] = {}
        """What micro-batches that went with others have received."""

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """As the stage, perhaps with others."""
        self.held.pop(micro_batch, None)
        ask = Ask(self, micro_batch, batch, received)
        found = self.pool.through(ask)
        if ask.alone:
            return found
        if torch.is_grad_enabled():
            self.held[micro_batch] = batch, received
        flags = {spec.name: spec.requires_grad for spec in self.halves.returned}
        return {name: x.detach().requires_grad_(torch.is_grad_enabled() and flags[name]) for name, x in found.items()}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the stage, perhaps with others."""
        if micro_batch not in self.held:
            return super().backward(micro_batch, gradients)
        batch, received = self.held.pop(micro_batch)
        return self.pool.through(Ask(self, micro_batch, batch, received, gradients))

    def by_itself(self, ask: Ask) -> dict[str, Tensor]:
        """What was asked, without others."""
        made = super().forward(ask.micro_batch, ask.batch, ask.received)
        return made if ask.gradients is None else super().backward(ask.micro_batch, ask.gradients)


def _cat(each: Sequence[Tensor], counts: Sequence[int], shape: Sequence[int]) -> Tensor:
    if all(x.dim() and x.shape[0] == count for x, count in zip(each, counts, strict=True)) and (
        shape and shape[0] == sum(counts)
    ):
        joined = torch.cat([x.detach() for x in each])
        return joined.requires_grad_(each[0].requires_grad)
    if tuple(each[0].shape) == tuple(shape) and all(torch.equal(each[0], x) for x in each[1:]):
        return each[0]
    raise Unfit("a value that is no row for each sample differs")


def _joined(batches: Sequence[Any], counts: Sequence[int]) -> Any:
    """The batches' rows one after the other; what has none is the same in all."""
    first = batches[0]
    if isinstance(first, Tensor):
        split = first.dim() and all(x.shape[0] == count for x, count in zip(batches, counts, strict=True))
        return torch.cat(list(batches)) if split else first
    if isinstance(first, Mapping):
        return {key: _joined([one[key] for one in batches], counts) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined(each, counts) for each in zip(*batches, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(_joined(each, counts) for each in zip(*batches, strict=True))
    return first


def _same(found: Mapping[str, Tensor], ask: Ask) -> bool:
    """Whether a session's part of a pass is what it gets alone; rounding aside."""
    with torch.no_grad():
        alone = Shown.forward(ask.stage, PASS, ask.batch, ask.received)
    return all(
        torch.allclose(x, alone[name], rtol=1e-3, atol=1e-3 * float(alone[name].abs().max()))
        for name, x in found.items()
    )
