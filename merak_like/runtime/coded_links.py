"""Transfers through codecs: what a stage sends another is coded where it leaves and decoded where it is used.

    send   x --pack--> body, side --> one vector of bytes --> the links below
    take   the links below --> the vector --unpack--> x'

How many bytes a value takes follows from its shape and from what both ends remember of its samples, so a receive is
posted beforehand as ever, and no header travels: a transfer is the codec's body and side, to the byte. Coded are
activations that a gradient comes back for, and these gradients. All else (token ids, masks, positions, random states)
goes as it is. So does everything where nothing is learnt: what is evaluated and asked for text is the model that will
be saved. A scale over a channel would also let samples feel who is beside them, and tokens which ones follow.

Tensor-parallel ranks each code what they have: of what all have they have the same afterwards, since the same is drawn
on all of them. Stages of one rank hand values on as they are. Replicas remember the samples that they saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from merak_like.partitioner.coding import Coding
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.codecs import CODECS, Codec, Context, OutOfStep, codec
from merak_like.runtime.codecs.chain import joined
from merak_like.runtime.codecs.codec import DIRECTIONS, Direction, by_sample
from merak_like.runtime.codecs.wire import Layout, as_bytes, from_bytes, to_bytes
from merak_like.runtime.links import Links, Spec
from merak_like.runtime.names import Names

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
        able = ", ".join(name for name, kind in CODECS.items() if kind().fixed)
        raise ValueError(
            f"codec={text!r} is not for pipeline links: the receiving stage cannot know beforehand how long its "
            f"transfers are. Those that are: {able}, also chained"
        )
    rows = tuple(range(TYPICAL[0])) if made.remembers else ()
    for direction in DIRECTIONS:
        try:
            made.packed(Layout(TYPICAL, torch.float32), Context(direction=direction, samples=rows))
        except ValueError as error:
            raise ValueError(f"codec={text!r} cannot carry what stages send, a row for each sample: {error}") from None
    if pp == 1:
        raise ValueError(f"codec={text!r} is for what pipeline stages send each other: use pp=2 or more, or leave it")
    return made.text


def coding_of(text: str | None, model: nn.Module) -> Coding | None:
    """What a planner must know of a codec, for values in the model's dtype; None for none.

    Of one that remembers samples it counts with later visits: a run has more epochs than one, or the codec is no use.
    """
    if text is None:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made, typical = codec(text), Layout(TYPICAL, dtype)
    sizes = (made.packed(typical, Context(direction=direction)) for direction in DIRECTIONS)
    each = [(body.nbytes + side) / typical.nbytes for body, side in sizes]
    return Coding(made.text, sum(each) / len(each), made.remembers)


Place = tuple[int, int, int]
"""An edge and a value's place on it: traces of other shapes name the same value otherwise."""


class Way(NamedTuple):
    """How a value goes through its codec."""

    place: Place
    codec: Codec
    layout: Layout
    """Of the value as the codec sees it."""
    context: Context

    @property
    def packed(self) -> tuple[Layout, int]:
        """The body and the bytes of the side of what is sent next."""
        return self.codec.packed(self.layout, self.context)

    @property
    def nbytes(self) -> int:
        """Of what is sent next."""
        body, side = self.packed
        return body.nbytes + side


class CodedLinks:
    """Links whose values go through a codec."""

    def __init__(
        self, links: Links, text: str, *, steps: Callable[[], int], mine: Sequence[int], seed: int,
        device: torch.device, names: Names | None = None,
    ) -> None:  # fmt: skip
        """``steps`` tells how many are done, ``mine`` which of the step's micro-batches this replica runs.

        ``names`` are told each step whose samples these have, for codecs that remember. Codecs that draw do so by
        ``seed``, step, micro-batch, edge and value: the same in every layout of replicas.
        """
        self.links, self.text = links, text
        self._steps, self._mine, self._seed, self._device = steps, mine, seed, device
        self._names = names or Names(text)
        self._codecs: dict[Place, Codec] = {}
        self._seen: set[Place] = set()
        """Where no mask was found among the numbers."""
        self._awaited: dict[Action, Sequence[tuple[Spec, Way]]] = {}

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        """As ``Links``."""
        ways = self._awaited[action] = self._ways(action, specs)
        self.links.post(action, wires(specs, {spec.name: way.nbytes for spec, way in ways}))

    def take(self, action: Action) -> dict[str, Tensor]:
        """As ``Links``. Raises RuntimeError, with edge and step, where the two ends do not remember the same."""
        found = self.links.take(action)
        for spec, way in self._awaited.pop(action):
            found[spec.name] = _decoded(way, action, spec, found[spec.name])
        return found

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """As ``Links``."""
        ways, sent = self._ways(action, specs), dict(values)
        nbytes = {spec.name: way.nbytes for spec, way in ways}  # to encode is to remember, which changes lengths
        for spec, way in ways:
            x = values[spec.name].detach()
            if way.place not in self._seen and action.kind in FORWARD:
                _refuse_a_mask(self.text, spec, x, way)
                self._seen.add(way.place)
            sent[spec.name] = _encoded(way, x)
        self.links.send(action, wires(specs, nbytes), sent)

    def flush(self) -> None:
        """As ``Links``."""
        self.links.flush()

    def state_dict(self) -> dict[str, Tensor]:
        """What codecs remember from step to step, of both ends of an edge under the same names."""
        if not self._names.needed:
            return {}
        state = joined({".".join(map(str, place)): one for place, one in self._codecs.items()})
        return {key: tensor for key, tensor in state.items() if tensor.numel()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken; what is not in it is forgotten."""
        parts: dict[Place, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            source, target, place, rest = key.split(".", 3)
            parts.setdefault((int(source), int(target), int(place)), {})[rest] = tensor
        self._codecs = {place: codec(self.text) for place in parts}
        for place, part in parts.items():
            self._codecs[place].load_state_dict(part)

    def _ways(self, action: Action, specs: Sequence[Spec]) -> list[tuple[Spec, Way]]:
        return [(spec, self._way(action, place, spec)) for spec, place in coded(action, specs)]

    def _way(self, action: Action, place: int, spec: Spec) -> Way:
        edge, layout, samples = _edge(action), Layout(spec.shape, spec.dtype), tuple[int, ...]()
        if self._names.needed:
            samples = self._names.each[action.micro_batch]
            layout = by_rows(layout, len(samples))
        context = Context(
            self._steps(), self._mine[action.micro_batch], direction(action), samples,
            training=not self._names.needed or by_sample(layout.shape)[0] == len(samples),
            seed=_seed(self._seed, *edge, place), limit=max(1, *layout.shape, layout.numel), device=self._device,
        )  # fmt: skip
        if (*edge, place) not in self._codecs:
            self._codecs[*edge, place] = codec(self.text)
        return Way((*edge, place), self._codecs[*edge, place], layout, context)


@torch.no_grad()
def _encoded(way: Way, x: Tensor) -> Tensor:
    body, side = way.codec.pack(x.reshape(way.layout.shape), way.context)
    return torch.cat([as_bytes(body), from_bytes(side, torch.uint8, body.device)])


def _decoded(way: Way, action: Action, spec: Spec, data: Tensor) -> Tensor:
    wanted, _ = way.packed
    body, side = data[: wanted.nbytes].view(wanted.dtype).view(wanted.shape), to_bytes(data[wanted.nbytes :])
    try:
        with torch.no_grad():
            x = way.codec.unpack(body, side, way.layout, way.context)
    except ValueError as error:
        raise _apart(action, spec, error) from None
    return x.reshape(spec.shape).requires_grad_(spec.requires_grad)


def wires(specs: Sequence[Spec], nbytes: Mapping[str, int]) -> list[Spec]:
    """What travels for these values: of those that have lengths, so many bytes."""
    return [Spec(s.name, (nbytes[s.name],), torch.uint8, False) if s.name in nbytes else s for s in specs]


def direction(action: Action) -> Direction:
    """Of what an action sends or receives."""
    return "forward" if action.kind in FORWARD else "backward"


def by_rows(x: Layout, samples: int) -> Layout:
    """A value with a row for each sample; rows of one sample that lie behind each other are one. Others stay."""
    many, left = divmod(x.shape[0] if len(x.shape) > 1 else 0, samples)
    return x if left or many < 2 else Layout((samples, many, *x.shape[1:]), x.dtype)


def coded(action: Action, specs: Sequence[Spec]) -> Iterator[tuple[Spec, int]]:
    """The values of a transfer that go through the codec, each with its place among those that have gradients."""
    if not torch.is_grad_enabled():
        return iter(())
    learnt = [spec for spec in specs if spec.requires_grad or action.kind not in FORWARD]
    return ((spec, place) for place, spec in enumerate(learnt) if spec.dtype.is_floating_point)


@torch.no_grad()
def _refuse_a_mask(text: str, spec: Spec, x: Tensor, way: Way) -> None:
    """Raise ValueError where a value has a mask's huge numbers among others, and nothing would be left of these.

    A position bias may come with its mask added, and a scale for the one loses the other.
    """
    others = x.abs() < torch.finfo(x.dtype).max / 4
    if bool(others.all()) or not bool(others.any()):
        return
    body, side = codec(text).pack(x.reshape(way.layout.shape), way.context)
    error = (codec(text).unpack(body, side, way.layout, way.context).view(x.shape) - x)[others].abs().max()
    most = x[others].abs().max()
    if bool(error > 0) and not bool(error < most):
        raise ValueError(
            f"codec={text!r} would leave nothing of {spec.name}, a value between two stages with numbers up to "
            f"{float(most):.3g} beside some of {float(x.abs().max()):.3g}, such as masks have: use fp16 or bf16"
        )


def _apart(action: Action, spec: Spec, error: ValueError) -> Exception:
    """Why what came cannot be decoded, with the edge; its own end of it is not to blame alone, so nobody goes on."""
    where = f"{spec.name} from stage {action.peer} to stage {action.stage}"
    if not isinstance(error, OutOfStep):
        return ValueError(f"{where}: {error}")
    return RuntimeError(
        f"{where}: {error.transfer} builds on another memory than this rank has, for {len(error.samples)} samples "
        f"({error.some}): were ranks told other samples, or do their devices round otherwise? Go on from the last "
        "checkpoint, or with a codec that has no memory"
    )


@cache
def _seed(seed: int, source: int, target: int, place: int) -> int:
    """By which a codec draws for one value of one edge: reckoned once, not in each micro-batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{target}/{place}".encode()).digest()[:7], "big")


def _edge(action: Action) -> tuple[int, int]:
    """The stage that an action's activation, or the one of its gradient, is made on, and the one it goes to."""
    ends = (action.stage, action.peer)
    return ends if ends[0] < ends[1] else (ends[1], ends[0])
