"""What may be done to a tensor on a link: a codec, the context both ends share, and the frame that travels.

    sender                                   receiver
    frame = codec.encode(x, context)  --->   x' = codec.decode(frame, context)

A codec makes of a tensor a smaller tensor, its *body*, and a few bytes beside it, its *side*. So codecs chain: the
body of one is the tensor of the next. A frame is

    magic  version  direction  codec  step  micro-batch  crc  |  layout of x  side  layout of the body  |  body

Nothing in it is run or trusted: sizes are checked against a limit before anything is allocated, and bytes that are
damaged, or of another codec, step or direction, are a ValueError. A checksum is not a signature: who sent it, the
transport proves.
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from merak_like.runtime.codecs.wire import Layout, Reader, as_bytes, from_bytes, layout_of, number, written

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
MAGIC, VERSION = b"mL", 1
HEADER = struct.Struct("<2sBBIIHI")  # magic, version, direction, codec, step, micro-batch, crc of all the rest
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Context:
    """What both ends know about a transfer without being told."""

    step: int = 0
    micro_batch: int = 0
    direction: Direction = "forward"
    """Activations go forward, gradients backward."""
    samples: tuple[int, ...] = ()
    """An id for each sample (index of the first dimension), the same at every visit; for codecs with memory."""
    training: bool = True
    """Whether a backward follows; without one a codec draws and remembers nothing."""
    paired: bool = True
    """Whether the same codec carries the forward and its backward; with ``a|b`` each has one direction to itself."""
    seed: int = 0
    """For codecs that draw at random; only the sender's matters."""
    limit: int = 2**28
    """Most elements a received frame may claim, in any tensor on the way."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the receiver wants the tensor."""

    @property
    def limit_bytes(self) -> int:
        """Most elements of a body of bytes: 8 an element, and what a codec writes in front of them and of samples."""
        return 8 * self.limit + 64 * (len(self.samples) + 1)

    @property
    def answers(self) -> bool:
        """Whether this is the gradient of what the same codec carried forward."""
        return self.direction == "backward" and self.paired and self.training

    def generator(self, salt: str, device: torch.device) -> torch.Generator:
        """Random numbers of this transfer alone: a repetition draws the same, and the global state is left alone."""
        name = f"{self.seed} {self.step} {self.micro_batch} {self.direction} {salt}"
        digest = blake2b(name.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Codec(ABC):
    """One end of a link's codec, for one value: a dataclass whose fields are its arguments.

    The two ends must be given the same arguments; state, where there is any, is kept equal by the frames. A link that
    carries several values has a codec for each.
    """

    name: ClassVar[str]

    @property
    def remembers(self) -> bool:
        """Whether it keeps something of each sample, by the ids in the context."""
        return False

    @property
    def fixed(self) -> bool:
        """Whether ``packed`` is exact whatever the tensor holds, so that a receiver can count on it."""
        return True

    @abstractmethod
    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        """The body, on x's device, and the side."""

    @abstractmethod
    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        """The tensor of ``layout`` that was packed.

        Raises ValueError for a body or side that ``pack`` cannot have made.
        """

    @abstractmethod
    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        """What ``pack`` makes next of a tensor of this layout: the body's layout and the bytes of the side."""

    def encode(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The frame: a vector of uint8 on the host.

        Raises ValueError for a tensor that the codec cannot carry.
        """
        context = context or Context()
        with torch.no_grad():
            head, body = self._blob(x.detach(), context)
        fixed = self._fixed(context)
        crc = zlib.crc32(body.numpy().data, zlib.crc32(head, zlib.crc32(fixed)))
        return torch.cat([torch.frombuffer(bytearray(fixed + CHECKSUM.pack(crc) + head), dtype=torch.uint8), body])

    def decode(self, frame: Tensor | bytes | bytearray | memoryview, context: Context | None = None) -> Tensor:
        """The tensor of a frame that the other end encoded in the same context, on ``context.device``.

        The result shares no memory with the frame. Raises ValueError for a frame that is damaged, that another codec
        made, or that belongs to another step, micro-batch or direction; OutOfStep where the two ends' memories differ.
        """
        context = context or Context()
        data = as_bytes(frame).cpu().numpy().data if isinstance(frame, Tensor) else memoryview(frame)
        reader = Reader(data)
        fixed = reader.take(HEADER.size - CHECKSUM.size, "the header")
        (crc,) = CHECKSUM.unpack(reader.take(CHECKSUM.size, "the checksum"))
        self._check(fixed, context)
        if zlib.crc32(data[HEADER.size :], zlib.crc32(fixed)) != crc:
            raise ValueError(f"the frame of {self._transfer(context)} is damaged: its checksum does not fit its bytes")
        with torch.no_grad():
            return self._unblob(reader, context)

    def wire_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, context: Context | None = None) -> int:
        """Bytes of a frame for a tensor of this shape.

        Exact; for ``deflate`` the most it can be. For codecs with memory by what they remember of the context's
        samples, or, where it names none, once they remember every sample.
        """
        layout = Layout(tuple(shape), dtype)
        body, side = self.packed(layout, context or Context())
        return HEADER.size + blob_bytes(layout, body, side)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is not an argument, as tensors under plain names."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken. Raises ValueError for names it does not know."""
        if state:
            raise ValueError(f"{self.text} has no state, found {', '.join(sorted(state))}: was it another codec's?")

    def forget(self, samples: Collection[int] | None = None) -> None:  # noqa: B027 - most codecs remember nothing
        """Forget these samples, or everything: the next frame with them is whole."""

    def expect(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> None:
        """Raises ValueError where a body or side has not the form that ``packed`` says."""
        wanted, length = self.packed(layout, context)
        if layout_of(body) != wanted or len(side) != length:
            raise ValueError(
                f"the frame is malformed: {self.text} makes of {layout} a body of {wanted} and {length} bytes of side, "
                f"found {layout_of(body)} and {len(side)}"
            )

    @property
    def text(self) -> str:
        """The text that makes this codec again."""
        return f"{self.name}({words})" if (words := ", ".join(self._arguments())) else self.name

    def __str__(self) -> str:
        return self.text

    def _arguments(self) -> list[str]:
        """Arguments that are not the default, and a leading number; the first ones without their names."""
        said: list[str] = []
        for i, argument in enumerate(arguments(type(self))):
            value = getattr(self, argument.name)
            if value != argument.default or (i == 0 and isinstance(value, int | float)):
                said.append(f"{value!r}" if i == len(said) else f"{argument.name}={value!r}")
        return said

    def _fixed(self, context: Context) -> bytes:
        codec = zlib.crc32(self.text.encode())
        direction = DIRECTIONS.index(context.direction)
        header = HEADER.pack(MAGIC, VERSION, direction, codec, context.step % 2**32, context.micro_batch % 2**16, 0)
        return header[: -CHECKSUM.size]

    def _check(self, fixed: bytes, context: Context) -> None:
        """Refuse a frame of anything but this transfer, saying what differs."""
        wanted = HEADER.unpack(self._fixed(context) + bytes(CHECKSUM.size))
        found = HEADER.unpack(fixed + bytes(CHECKSUM.size))
        if found[0] != MAGIC:
            raise ValueError(f"this is no codec's frame: it begins with {found[0]!r}, not {MAGIC!r}")
        if found[1] != VERSION:
            raise ValueError(f"the frame is of format {found[1]}, this end reads {VERSION}: use the same release")
        if found[3] != wanted[3]:
            raise ValueError(
                f"the frame was made by a codec other than {self.text}: give both ends the same codec and arguments"
            )
        if found != wanted:
            other = f"step {found[4]}, micro-batch {found[5]}, {dict(enumerate(DIRECTIONS)).get(found[2], 'nowhere')}"
            raise ValueError(f"the frame is of {other}; {self._transfer(context)} is awaited")

    @staticmethod
    def _transfer(context: Context) -> str:
        return f"step {context.step}, micro-batch {context.micro_batch}, {context.direction}"

    def _blob(self, x: Tensor, context: Context) -> tuple[bytes, Tensor]:
        """A tensor's layout and side as bytes, and its body as bytes on the host."""
        body, side = self.pack(x, context)
        return written(layout_of(x)) + number(len(side)) + side + written(layout_of(body)), as_bytes(body).cpu()

    def _unblob(self, reader: Reader, context: Context) -> Tensor:
        layout = reader.layout(context.limit)
        side = reader.take(reader.number("the side's length"), "the side")
        packed = reader.layout(context.limit_bytes)
        data = reader.rest()
        if len(data) != packed.nbytes:
            raise ValueError(f"the frame is malformed: {len(data)} bytes for a body of {packed}")
        body = from_bytes(data, packed.dtype, context.device).view(packed.shape)
        x = self.unpack(body, side, layout, context)
        assert layout_of(x) == layout, (self.text, layout_of(x), layout)
        return x

    def blob(self, x: Tensor, context: Context) -> Tensor:
        """A frame without its header, for a codec within a codec: a vector of uint8 on x's device."""
        head, body = self._blob(x, context)
        return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), body]).to(x.device)

    def unblob(self, data: Tensor, context: Context) -> Tensor:
        """The tensor of a blob, on the blob's device."""
        return self._unblob(Reader(data.cpu().numpy().data), replace(context, device=data.device))


class OutOfStep(ValueError):
    """The receiver's memory of some samples is not what the frame builds on: one was lost, or came out of order.

    Nothing was changed. The remedy: the sender calls ``forget`` for all samples of the frame and encodes again.
    """

    def __init__(self, samples: tuple[int, ...], transfer: str) -> None:
        self.samples, self.transfer = samples, transfer
        self.some = ", ".join(map(str, samples[:5])) + ", ..." * (len(samples) > 5)
        super().__init__(
            f"{transfer} builds on frames this end has not seen, for {len(samples)} samples ({self.some}): "
            f"let the sender forget the samples of this frame and encode it again"
        )


def arguments(kind: type[Codec]) -> list[Any]:
    """The fields of a codec that are its arguments."""
    return [f for f in fields(kind) if f.init]  # type: ignore[arg-type]  # every codec is a dataclass


def blob_bytes(layout: Layout, body: Layout, side: int) -> int:
    """Bytes of a blob with a side of ``side`` bytes."""
    return len(written(layout)) + len(number(side)) + side + len(written(body)) + body.nbytes


def require_floating(x: Layout, who: str) -> None:
    """Raises ValueError for a tensor that is not of floating point: nothing else has a near value."""
    if not x.dtype.is_floating_point:
        raise ValueError(f"{who} carries floating-point tensors, found {x}: use identity or deflate for it")


def by_sample(shape: tuple[int, ...]) -> tuple[int, int]:
    """Samples and features of each: the first dimension counts samples, a vector or a scalar is one."""
    layout = Layout(tuple(shape), torch.uint8)
    if len(shape) < 2:
        return 1, layout.numel
    return shape[0], Layout(tuple(shape[1:]), torch.uint8).numel
