"""Transfers through codecs: what a stage sends another is coded where it leaves and decoded where it is used.

    send   x --pack--> body, side --> one vector of bytes --> the links below
    take   the links below --> the vector --unpack--> x'

How many bytes a value takes follows from its shape, so a receive is posted beforehand as ever, and no header travels:
a transfer is the codec's body and side, to the byte. Coded are activations that a gradient comes back for, and these
gradients. All else (token ids, masks, positions, random states) goes as it is. So does everything where nothing is
learnt: what is evaluated and asked for text is the model that will be saved. A scale over a channel would also let
samples feel who is beside them, and tokens which ones follow.

Tensor-parallel ranks each code what they have: of what all have they have the same afterwards, since the same is drawn
on all of them. Stages of one rank hand values on as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from merak_like.partitioner.coding import Coding
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.codecs import CODECS, Codec, Context, codec
from merak_like.runtime.codecs.codec import DIRECTIONS
from merak_like.runtime.codecs.wire import Layout, as_bytes, from_bytes, to_bytes
from merak_like.runtime.links import Links, Spec

FORWARD = (Kind.SEND_F, Kind.RECV_F)
TYPICAL = (4, 256, 1024)
"""Samples, positions and channels of a value by which a planner takes a codec's share of bytes."""


def link_codec(text: str | None, pp: int | None) -> str | None:
    """The canonical text of a codec for pipeline links; None for none.

    ``pp`` is the pipeline's degree, None where it is to be chosen. Raises ValueError for what is no codec, for one
    whose transfers have no length that the receiver knows, and for a pipeline of one stage.
    """
    if text is None:
        return None
    made = codec(text)
    if not made.fixed:
        why = (
            "nothing names a batch's samples to a stage, by which it remembers" if made.remembers else
            "the receiving stage cannot know beforehand how long its transfers are"
        )  # fmt: skip
        able = ", ".join(name for name, kind in CODECS.items() if kind().fixed)
        raise ValueError(f"codec={text!r} is not for pipeline links: {why}. Those that are: {able}, also chained")
    if pp == 1:
        raise ValueError(f"codec={text!r} is for what pipeline stages send each other: use pp=2 or more, or leave it")
    return made.text


def coding_of(text: str | None, model: nn.Module) -> Coding | None:
    """What a planner must know of a codec, for values in the model's dtype; None for none."""
    if text is None:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made, typical = codec(text), Layout(TYPICAL, dtype)
    sizes = (made.packed(typical, Context(direction=direction)) for direction in DIRECTIONS)
    each = [(body.nbytes + side) / typical.nbytes for body, side in sizes]
    return Coding(made.text, sum(each) / len(each))


class CodedLinks:
    """Links whose values go through a codec."""

    def __init__(
        self, links: Links, text: str, *, steps: Callable[[], int], mine: Sequence[int], seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """``steps`` tells how many are done, ``mine`` which of the step's micro-batches this replica runs.

        Codecs that draw do so by ``seed``, step, micro-batch, edge and value: the same in every layout of replicas.
        """
        self.links, self.text = links, text
        self._steps, self._mine, self._seed, self._device = steps, mine, seed, device
        self._sizes = codec(text)
        """Asked for lengths only."""
        self._codecs: dict[tuple[int, int, int], Codec] = {}
        """By edge and by the value's place on it: traces of other shapes name the same value otherwise."""
        self._awaited: dict[Action, Sequence[Spec]] = {}

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        """As ``Links``."""
        self._awaited[action] = specs
        self.links.post(action, self._wires(action, specs))

    def take(self, action: Action) -> dict[str, Tensor]:
        """As ``Links``."""
        found = self.links.take(action)
        for spec, place in coded(action, self._awaited.pop(action)):
            found[spec.name] = self._decoded(action, place, spec, found[spec.name])
        return found

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """As ``Links``."""
        sent = dict(values)
        for spec, place in coded(action, specs):
            sent[spec.name] = self._encoded(action, place, spec, values[spec.name])
        self.links.send(action, self._wires(action, specs), sent)

    def flush(self) -> None:
        """As ``Links``."""
        self.links.flush()

    def _wires(self, action: Action, specs: Sequence[Spec]) -> list[Spec]:
        """What travels for these values."""
        wires = {spec.name: spec for spec in specs}
        for spec, place in coded(action, specs):
            body, side = self._sizes.packed(Layout(spec.shape, spec.dtype), self._context(action, place, spec))
            wires[spec.name] = Spec(spec.name, (body.nbytes + side,), torch.uint8, False)
        return [*wires.values()]

    def _encoded(self, action: Action, place: int, spec: Spec, x: Tensor) -> Tensor:
        context = self._context(action, place, spec)
        if (*_edge(action), place) not in self._codecs and action.kind in FORWARD:
            _refuse_a_mask(self.text, spec, x, context)
        with torch.no_grad():
            body, side = self._codec(action, place).pack(x.detach(), context)
        return torch.cat([as_bytes(body), from_bytes(side, torch.uint8, body.device)])

    def _decoded(self, action: Action, place: int, spec: Spec, data: Tensor) -> Tensor:
        context, layout = self._context(action, place, spec), Layout(spec.shape, spec.dtype)
        wanted, _ = self._sizes.packed(layout, context)
        body, side = data[: wanted.nbytes].view(wanted.dtype).view(wanted.shape), to_bytes(data[wanted.nbytes :])
        with torch.no_grad():
            x = self._codec(action, place).unpack(body, side, layout, context)
        return x.requires_grad_(spec.requires_grad)

    def _codec(self, action: Action, place: int) -> Codec:
        key = (*_edge(action), place)
        if key not in self._codecs:
            self._codecs[key] = codec(self.text)
        return self._codecs[key]

    def _context(self, action: Action, place: int, spec: Spec) -> Context:
        return Context(
            self._steps(), self._mine[action.micro_batch], "forward" if action.kind in FORWARD else "backward",
            seed=_seed(self._seed, *_edge(action), place),
            limit=max(1, *spec.shape, Layout(spec.shape, spec.dtype).numel), device=self._device,
        )  # fmt: skip


def coded(action: Action, specs: Sequence[Spec]) -> Iterator[tuple[Spec, int]]:
    """The values of a transfer that go through the codec, each with its place among those that have gradients."""
    if not torch.is_grad_enabled():
        return iter(())
    learnt = [spec for spec in specs if spec.requires_grad or action.kind not in FORWARD]
    return ((spec, place) for place, spec in enumerate(learnt) if spec.dtype.is_floating_point)


@torch.no_grad()
def _refuse_a_mask(text: str, spec: Spec, x: Tensor, context: Context) -> None:
    """Raise ValueError where a value has a mask's huge numbers among others, and nothing would be left of these.

    A position bias may come with its mask added, and a scale for the one loses the other.
    """
    others = x.abs() < torch.finfo(x.dtype).max / 4
    if bool(others.all()) or not bool(others.any()):
        return
    body, side = codec(text).pack(x, context)
    error = (codec(text).unpack(body, side, Layout(spec.shape, spec.dtype), context) - x)[others].abs().max()
    most = x[others].abs().max()
    if bool(error > 0) and not bool(error < most):
        raise ValueError(
            f"codec={text!r} would leave nothing of {spec.name}, a value between two stages with numbers up to "
            f"{float(most):.3g} beside some of {float(x.abs().max()):.3g}, such as masks have: use fp16 or bf16"
        )


@cache
def _seed(seed: int, source: int, target: int, place: int) -> int:
    """By which a codec draws for one value of one edge: reckoned once, not in each micro-batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{target}/{place}".encode()).digest()[:7], "big")


def _edge(action: Action) -> tuple[int, int]:
    """The stage that an action's activation, or the one of its gradient, is made on, and the one it goes to."""
    ends = (action.stage, action.peer)
    return ends if ends[0] < ends[1] else (ends[1], ends[0])
