"""The edge's own layers on their way to a mean over a group (SplitFed): which tensors they are, and in what pieces.

head, tail ──flat──► piece 0 | piece 1 | ... ──► host: weighted mean ──► pieces ──► head, tail

What is trained travels, and running means; counts, frozen layers and what an optimizer remembers stay. Both ends know
the pieces from the trace, so that nothing else is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor, nn

from merak_like.runtime.links import Spec
from merak_like.split.ahead import Ahead
from merak_like.split.connection import Connection
from merak_like.split.halves import Halves
from merak_like.split.wire import Key, Kind

PIECE = 2**18
"""Elements of a message."""


@dataclass(frozen=True)
class Layers:
    """Some tensors of a model, as one row of numbers, cut into pieces."""

    shapes: Mapping[str, tuple[int, ...]]
    """By first names, in the order of the row."""
    dtype: torch.dtype

    @property
    def pieces(self) -> tuple[Spec, ...]:
        """What travels, message by message."""
        count = sum(map(prod, self.shapes.values()))
        return tuple(
            Spec(f"piece {i}", (min(PIECE, count - at),), self.dtype, False)
            for i, at in enumerate(range(0, count, PIECE))
        )

    @property
    def nbytes(self) -> int:
        """Of all pieces."""
        return sum(piece.shape[0] for piece in self.pieces) * self.dtype.itemsize

    @torch.no_grad()
    def taken(self, model: nn.Module) -> dict[str, Tensor]:
        """A model's tensors as pieces."""
        tensors = _named(model)
        row = torch.cat([tensors[name].reshape(-1).to(self.dtype) for name in self.shapes])
        return {piece.name: part for piece, part in zip(self.pieces, row.split(PIECE), strict=True)}

    @torch.no_grad()
    def put(self, model: nn.Module, pieces: Mapping[str, Tensor]) -> None:
        """Give a model the tensors that the pieces are."""
        tensors = _named(model)
        row = torch.cat([pieces[piece.name] for piece in self.pieces])
        sizes = [prod(shape) for shape in self.shapes.values()]
        for (name, shape), part in zip(self.shapes.items(), row.split(sizes), strict=True):
            tensors[name].copy_(part.reshape(shape))


def layers_of(halves: Halves) -> Layers:
    """Of an edge. Raises ValueError where nothing of it is trained."""
    names = dict.fromkeys((*halves.params(0), *(halves.params(2) if halves.tailed else ())))
    found = {name: halves.trace.graph.parameter(name) for name in names}
    kinds = {name: getattr(torch, p.dtype) for name, p in found.items() if p.trainable or p.buffer}
    kinds = {name: dtype for name, dtype in kinds.items() if dtype.is_floating_point}
    if not any(found[name].trainable for name in kinds):
        raise ValueError("nothing of this edge's own layers is trained: there is nothing to average")
    finest = reduce(torch.promote_types, kinds.values(), torch.float32)  # no mean is taken in less
    return Layers({name: found[name].shape for name in kinds}, finest)


def trade(layers: Layers, model: nn.Module, exchange: Ahead, connection: Connection, step: int) -> None:
    """At the edge: give the host a model's layers, and take the mean for them."""
    connection.pieces = len(layers.pieces)
    connection.room = max(connection.room, connection.pieces * connection.assembler.largest)
    connection.expect(Key(Kind.GATHER, step))
    connection.send(Key(Kind.GATHER, step), b"")
    exchange.begin(connection, step, [])
    exchange.mute = False
    taken, mean = layers.taken(model), dict[str, Tensor]()
    for i, piece in enumerate(layers.pieces):
        exchange.put("own", "forward", i, taken, [piece])
    exchange.settle()
    for i, piece in enumerate(layers.pieces):
        mean |= exchange.take("own", "backward", i, [piece])
    connection.receive(Key(Kind.DONE, step))
    layers.put(model, mean)


def _named(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weighted(shares: Sequence[float], found: Iterable[Tensor]) -> Tensor:
    """The mean with these weights, which add up to 1; to the last bit what all have, where all have the same."""
    first, *others = found
    total = first.clone()
    for share, other in zip(shares[1:], others, strict=True):
        total.add_(other - first, alpha=share)
    return total
