"""One end's half of every transfer: tensors become codec frames and messages, and the other way round.

    link    forward                     backward
    up      edge's head -> cloud        gradients come back
    down    cloud -> edge's tail        gradients come back
    own     the edge's layers           their mean over a group comes back; never through a codec

The two codecs of a value are kept equal by the frames. A step that fails is done again from its beginning, so what the
codecs remembered at its beginning can be had back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from merak_like.runtime.codecs import Codec, Context, codec
from merak_like.runtime.links import Spec
from merak_like.split.wire import Key, Kind, WireError, pack, unpack

Link = Literal["up", "down", "own"]
Way = Literal["forward", "backward"]
KINDS: Mapping[tuple[Link, Way], Kind] = {
    ("up", "forward"): Kind.UP_FORWARD, ("up", "backward"): Kind.UP_BACKWARD,
    ("down", "forward"): Kind.DOWN_FORWARD, ("down", "backward"): Kind.DOWN_BACKWARD,
    ("own", "forward"): Kind.OWN, ("own", "backward"): Kind.MEAN,
}  # fmt: skip


def coded(spec: Spec, *, frozen: bool) -> bool:
    """Whether a value goes through the link's codec, or as it is: see ``Exchange``."""
    return spec.dtype.is_floating_point and (spec.requires_grad or frozen)


class Channel(Protocol):
    """How messages get to the other end and come from there."""

    def send(self, key: Key, body: bytes) -> None:
        """Start sending; waits where too much is under way already."""
        ...

    def receive(self, key: Key) -> bytes:
        """Wait for a message."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """End it; whoever waits is told the error."""
        ...


class Exchange:
    """What an engine's stages send and receive in the step under way."""

    def __init__(
        self, codecs: Mapping[Link, str], seed: int, device: torch.device,
        away: Callable[[], AbstractContextManager[None]] = nullcontext, most: float = 0.0,
        frozen: bool = False,
    ) -> None:  # fmt: skip
        """``away`` is entered while this end waits for the other. ``most`` limits received numbers; 0: it does not.

        Of values without a gradient only those of a ``frozen`` edge are a layer's result, which a codec may change; the
        others are masks, positions and the like.
        """
        self.frozen = frozen
        self.device = device
        self._texts, self._seed, self._away, self._most = dict(codecs), seed, away, most
        self._codecs: dict[tuple[Link, int], Codec] = {}
        self.channel: Channel | None = None
        self.step, self.training = 0, True
        self.heard = True
        """Whether the other end listens in this step; see ``contrasted``."""
        self.mute = False
        """Encode, so that codecs stay equal, but send nothing: the other end has done this step before."""
        self._samples: list[tuple[int, ...]] = []
        self.log: list[tuple[Key, bytes]] = []
        """What was sent in this step."""
        self.keep_log = False

    def begin(self, channel: Channel, step: int, samples: Sequence[tuple[int, ...]], *, training: bool = True) -> None:
        """A step begins, or begins again; ``samples`` are the ids of each micro-batch's samples."""
        self.channel, self.step, self.training, self._samples = channel, step, training, list(samples)
        self.log = []

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Send some values; where there are none, nothing."""
        if not specs:
            return
        assert self.channel is not None
        key = Key(KINDS[link, way], self.step, micro_batch)
        body = self._encoded(link, way, micro_batch, values, specs)
        if self.keep_log:
            self.log.append((key, body))
        if not self.mute:
            with self._away():
                self.channel.send(key, body)

    def take(self, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        """Wait for some values, if any. Raises WireError for values of another shape, or that are not finite."""
        if not specs:
            return {}
        assert self.channel is not None
        key = Key(KINDS[link, way], self.step, micro_batch)
        with self._away():
            body = self.channel.receive(key)
        return self._decoded(link, way, key, body, specs)

    def _encoded(
        self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]
    ) -> bytes:
        parts = []
        for i, spec in enumerate(specs):
            frame = self._codec(link, i, spec).encode(values[spec.name], self._context(way, micro_batch))
            parts.append(frame.numpy().data)
        return pack(parts)

    def _decoded(self, link: Link, way: Way, key: Key, body: bytes, specs: Sequence[Spec]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, (spec, frame) in enumerate(zip(specs, unpack(body, len(specs)), strict=True)):
            context = self._context(way, key.micro_batch)
            limit = max(1, *spec.shape, torch.Size(spec.shape).numel())
            x = self._codec(link, i, spec).decode(frame, replace(context, limit=limit))
            if tuple(x.shape) != spec.shape or x.dtype != spec.dtype:
                raise WireError(
                    f"{key}: {spec.name} is {tuple(x.shape)} of {x.dtype}, {spec.shape} of {spec.dtype} due"
                )
            self._check(x, key, spec.name)
            found[spec.name] = x.requires_grad_() if spec.requires_grad and way == "forward" else x
        return found

    def over(self) -> None:
        """The step's last value is through."""

    def bytes_of(self, link: Link, way: Way, specs: Sequence[Spec]) -> int:
        """The most bytes of a message with these values, whatever a codec remembers."""
        total = 0
        for i, spec in enumerate(specs):
            # Some codecs send more in an evaluation, and a session must not be smaller after one than before.
            contexts = [replace(self._context(way, -1), training=training) for training in (True, False)]
            rows = spec.shape[0] if spec.shape else 1
            raw = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            coded = [self._codec(link, i, spec).wire_bytes(spec.shape, spec.dtype, c) for c in contexts]
            total += max(raw, *coded) + 64 * rows + 4096
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """What the codecs remember."""
        return {
            f"{link}/{place}/{key}": tensor
            for (link, place), one in self._codecs.items()
            for key, tensor in one.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken; codecs that are not in it start anew."""
        grouped: dict[tuple[Link, int], dict[str, Tensor]] = {}
        for name, tensor in state.items():
            link, place, key = name.split("/", 2)
            if link not in ("up", "down"):
                raise ValueError(f"{name!r} is no codec's state")
            grouped.setdefault((link, int(place)), {})[key] = tensor
        self._codecs = {}
        for (link, place), part in grouped.items():
            self._codecs[link, place] = made = codec(self._texts[link])
            made.load_state_dict(part)

    def _codec(self, link: Link, place: int, spec: Spec) -> Codec:
        """By place, not by name: traces of other shapes name the same value otherwise."""
        if link == "own" or not coded(spec, frozen=self.frozen):
            return codec("identity")
        return self._codecs.setdefault((link, place), codec(self._texts[link]))

    def _context(self, way: Way, micro_batch: int) -> Context:
        samples = self._samples[micro_batch] if 0 <= micro_batch < len(self._samples) else ()
        at = max(micro_batch, 0)
        return Context(self.step, at, way, samples, self.training, seed=self._seed, device=self.device)

    def _check(self, x: Tensor, key: Key, name: str) -> None:
        if x.dtype.is_floating_point:
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"{key}: {name} is not finite")
            if self._most and float(x.abs().amax() if x.numel() else 0.0) > self._most:
                raise FloatingPointError(f"{key}: {name} is larger than {self._most:g}, the most that is taken")
