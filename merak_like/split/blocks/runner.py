"""Parts of a model with their weights, run pass by pass on keys and values that are kept elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer import Trace
from merak_like.runtime.codecs.wire import to_bytes
from merak_like.runtime.materialize import fill
from merak_like.split.blocks.shapes import Shape, filled, given, roomy, shape_of
from merak_like.split.blocks.spans import PROBE, Ends, Room, Span, blocks_of, ends, names_of, recorded, run, span
from merak_like.split.half import Source

KEPT = 32
"""Shapes whose traces are kept."""


class Caches:
    """Keys and values of some blocks, for one set of texts; every byte is there from the beginning."""

    def __init__(self, rooms: Mapping[int, Room], batch: int, length: int, device: torch.device) -> None:
        self.start, self.tokens = 0, 0
        """Where the pass under way writes."""
        shapes = {i: ((batch, r.heads, roomy(length)), r) for i, r in rooms.items()}
        self.kept = {
            i: tuple(torch.zeros(*shape, size, dtype=room.dtype, device=device) for size in (room.key, room.value))
            for i, (shape, room) in shapes.items()
        }

    def take(self, block: int, new: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Write the real ones of these new keys and values; the first ``width`` tokens of all."""
        where = slice(self.start, self.start + self.tokens)
        for kept, x in zip(self.kept[block], new, strict=True):
            kept[:, :, where] = x[:, :, : self.tokens]
        keys, values = self.kept[block]
        return keys[:, :, :width], values[:, :, :width]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for pair in self.kept.values() for x in pair)


def bytes_of(rooms: Iterable[Room], batch: int, length: int) -> int:
    """Bytes that caches of these blocks take."""
    return sum(room.token_bytes for room in rooms) * batch * roomy(length)


class Runner:
    """A model of which some parts are here: part 0 is the head, part i + 1 block i, the last part the tail."""

    def __init__(self, source: Source, device: torch.device) -> None:
        """Raises ValueError for a model that cannot be run block by block with a cache."""
        from merak_like.hf.cached import Cached

        self.source, self.device = source, device
        self.cached = Cached(source.build()).eval()
        self._probe = recorded(self.cached, PROBE)
        self.blocks = blocks_of(self._probe, self.cached)
        self.dtype = next(self.cached.parameters()).dtype
        self._traces: dict[Shape, Trace] = {}
        self._spans: dict[tuple[Shape, int, int], Span] = {}
        self._ends: dict[tuple[Shape, int, int], Ends] = {}

    def load(self, parts: Sequence[tuple[int, int]]) -> None:
        """Read or make the weights of these parts; all else stays without memory."""
        from merak_like import hf

        names = {n for first, stop in parts for n in names_of(self._probe, self.cached, first, stop)}
        inner = {n.removeprefix("model.") for n in names}
        ties = [tuple(n.removeprefix("model.") for n in names) for names in self._probe.graph.ties]
        model = self.cached.model
        fill(
            model, inner, ties, self.device, seed=0, initialise=hf.initialiser(model), weights=self.source.weights,
            given=False,
        )  # fmt: skip
        self._traces, self._spans, self._ends = {}, {}, {}

    def print_of(self, block: int) -> str:
        """A fingerprint of a block's weights, by their bytes."""
        state = self.cached.state_dict(keep_vars=True)
        digest = blake2b(digest_size=16)
        for name in sorted(set(names_of(self._probe, self.cached, block + 1, block + 2)) & set(state)):
            digest.update(name.encode())
            digest.update(to_bytes(state[name].detach()))
        return digest.hexdigest()

    def ends(self, shape: Shape, first: int, stop: int) -> Ends:
        """What crosses the ends of some parts, in passes of a shape."""
        found = self._trace(shape)
        key = (shape, first, stop)
        if key not in self._ends:
            self._ends[key] = ends(found, self.cached, first, stop)
        return self._ends[key]

    def run(
        self, parts: tuple[int, int], caches: Caches, pads: Sequence[int], length: int, start: int,
        came: Mapping[str, Tensor], ids: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One pass of some parts over the tokens behind the first ``start`` ones; what they make for others.

        ``came`` are values of real tokens (batch, tokens, ...); ``ids`` (batch, tokens) only the head needs.
        """
        tokens = next(iter(came.values() if ids is None else [ids])).shape[1]
        shape = shape_of(len(pads), start, tokens, length)
        batch: dict[str, Any] = given(shape, pads, start, tokens, self.dtype)
        batch["input_ids"] = torch.zeros(1).long() if ids is None else filled(ids, shape.tokens)
        batch = {name: x.to(self.device) for name, x in batch.items()}
        caches.start, caches.tokens = start, tokens
        slots: Any = self.cached.slots
        for block in caches.kept:
            slots[block].store = lambda k, v, width, block=block: caches.take(block, (k, v), width)
        try:
            part = self._span(shape, *parts)
            made = run(part, batch, {n: filled(x.to(self.device), shape.tokens) for n, x in came.items()})
        finally:
            for block in caches.kept:
                slots[block].store = None
        return {n: x if n in ("logits", "loss") else x[:, :tokens] for n, x in made.items()}

    def _trace(self, shape: Shape) -> Trace:
        if shape not in self._traces:
            if len(self._traces) >= KEPT:
                old = next(iter(self._traces))
                self._spans = {key: one for key, one in self._spans.items() if key[0] != old}
                self._ends = {key: one for key, one in self._ends.items() if key[0] != old}
                del self._traces[old]
            self._traces[shape] = recorded(self.cached, shape, self.device)
        return self._traces[shape]

    def _span(self, shape: Shape, first: int, stop: int) -> Span:
        key = (shape, first, stop)
        if key not in self._spans:
            self._spans[key] = span(self._trace(shape), self.cached, first, stop)
        return self._spans[key]
