"""Codecs made of codecs: one behind the other, and another one for each direction.

topk(0.1)+int(4)     x --topk--> values, indices --int--> codes, scale        first to last on the way out, back in
aqsgd(4)|int(8)      forward | backward
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from merak_like.runtime.codecs.codec import Codec, Context
from merak_like.runtime.codecs.wire import Layout, Reader, layout_of, number, written


@dataclass(eq=False)
class Chain(Codec):
    """Each codec carries the body of the one before it; the chain's side holds theirs and the layouts between."""

    name: ClassVar[str] = "chain"
    codecs: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if len(self.codecs) < 2 or any(isinstance(codec, Chain | Duplex) for codec in self.codecs):
            raise ValueError(
                f"a chain is two or more single codecs, found {', '.join(map(str, self.codecs)) or 'none'}"
            )

    @property
    def text(self) -> str:
        return "+".join(codec.text for codec in self.codecs)

    @property
    def remembers(self) -> bool:
        return any(codec.remembers for codec in self.codecs)

    @property
    def fixed(self) -> bool:
        return all(codec.fixed for codec in self.codecs)

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        sides = b""
        for codec in self.codecs:
            if codec is not self.codecs[0]:
                sides += written(layout_of(x))
            x, side = codec.pack(x, context)
            sides += number(len(side)) + side
        return x, sides

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        reader = Reader(side)
        steps: list[tuple[Codec, bytes, Layout]] = []
        for codec in self.codecs:
            into = reader.layout(context.limit_bytes) if steps else layout
            steps.append((codec, reader.take(reader.number("a side's length"), "a side"), into))
        reader.end("the sides")
        for codec, own, into in reversed(steps):
            body = codec.unpack(body, own, into, context)
        return body

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        sides = 0
        for codec in self.codecs:
            if codec is not self.codecs[0]:
                sides += len(written(layout))
            layout, side = codec.packed(layout, context)
            sides += len(number(side)) + side
        return layout, sides

    def state_dict(self) -> dict[str, Tensor]:
        return joined({str(i): codec for i, codec in enumerate(self.codecs)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        share({str(i): codec for i, codec in enumerate(self.codecs)}, state, self.text)

    def forget(self, samples: Collection[int] | None = None) -> None:
        for codec in self.codecs:
            codec.forget(samples)


@dataclass(eq=False)
class Duplex(Codec):
    """One codec for activations, one for gradients: neither knows of the other's transfers."""

    name: ClassVar[str] = "duplex"
    forward: Codec
    backward: Codec

    def __post_init__(self) -> None:
        if isinstance(self.forward, Duplex) or isinstance(self.backward, Duplex):
            raise ValueError(f"a link has two directions, found three codecs: {self.text}")

    @property
    def text(self) -> str:
        return f"{self.forward.text}|{self.backward.text}"

    @property
    def remembers(self) -> bool:
        return self.forward.remembers or self.backward.remembers

    @property
    def fixed(self) -> bool:
        return self.forward.fixed and self.backward.fixed

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        return self._of(context).pack(x, replace(context, paired=False))

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        return self._of(context).unpack(body, side, layout, replace(context, paired=False))

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        return self._of(context).packed(layout, replace(context, paired=False))

    def state_dict(self) -> dict[str, Tensor]:
        return joined({"forward": self.forward, "backward": self.backward})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        share({"forward": self.forward, "backward": self.backward}, state, self.text)

    def forget(self, samples: Collection[int] | None = None) -> None:
        self.forward.forget(samples)
        self.backward.forget(samples)

    def _of(self, context: Context) -> Codec:
        return self.forward if context.direction == "forward" else self.backward


def joined(codecs: Mapping[str, Codec]) -> dict[str, Tensor]:
    """The states of several codecs, each under its name and a dot."""
    return {f"{name}.{key}": value for name, codec in codecs.items() for key, value in codec.state_dict().items()}


def share(codecs: Mapping[str, Codec], state: Mapping[str, Tensor], who: str) -> None:
    """Give each codec its part of ``joined``. Raises ValueError for a part of none of them."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in codecs}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        if name not in parts:
            raise ValueError(f"the state of {who} has parts {', '.join(parts)}, found {key!r}: was it another codec's?")
        parts[name][rest] = value
    for name, codec in codecs.items():
        codec.load_state_dict(parts[name])


def chain(codecs: Sequence[Codec]) -> Codec:
    """Several codecs as one; a single one is itself."""
    return codecs[0] if len(codecs) == 1 else Chain(tuple(codecs))
