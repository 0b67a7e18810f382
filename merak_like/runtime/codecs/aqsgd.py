"""``aqsgd``: the quantised change of an activation since the sample's last visit.

For every sample both ends hold a memory m. The first time its activation a travels whole and becomes m. Later

    sender    d = Q(a - m)   m <- m + d          receiver    m <- m + d,  a' = m

so that, as training changes less from visit to visit, so does the error: Wang et al. 2022, "Fine-tuning Language
Models over Slow Networks using Activation Quantization with Guarantees" (NeurIPS), algorithm 1. Q is the grid of
``int``, one scale per channel over the batch. Gradients have no memory: they go through ``int`` with twice the bits,
the proportion of the paper's runs (4 and 8, 3 and 6), unless ``aqsgd(4)|...`` says otherwise. Without training,
samples travel whole and nothing is remembered.

The memories stay bit-equal because both ends add the same decoded d. That is not assumed: a frame carries, for every
sample, a checksum of the memory it builds on. Where the receiver's is another, because a frame was lost, came twice
or out of order, it raises OutOfStep and changes nothing; the sender then forgets those samples and sends them whole.
A sample that comes in another shape travels whole. What is not finite arrives as NaN and is forgotten, so that it does
not stay. So which samples travel whole, and with it the length of a frame, follows from what both ends remember.

Memory: one row a sample in the activation's dtype, or ``store="fp16"``, in the host's memory as the paper has it; the
least recently used ones beyond ``capacity`` bytes are dropped when a step begins, by the same rule on both ends. It is
private data: ``forget()`` at the end of a session. Dropout or augmentation in front of the link make activations change
for other reasons than training, and the error shrinks less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import packed_bytes
from merak_like.runtime.codecs.codec import Codec, Context, OutOfStep, blob_bytes, by_sample, require_floating
from merak_like.runtime.codecs.memory import Memory, fingerprints
from merak_like.runtime.codecs.plain import Bf16, Fp16, Identity, narrow
from merak_like.runtime.codecs.uniform import Uniform, work_dtype
from merak_like.runtime.codecs.wire import Layout, Reader, layout_of, number

STORES: dict[str, type[Codec]] = {"same": Identity, "fp16": Fp16, "bf16": Bf16}
DIRECT, REMEMBERED = b"\x00", b"\x01"


@dataclass(eq=False)
class AqSgd(Codec):
    """``bits`` an element of the change."""

    name: ClassVar[str] = "aqsgd"
    bits: int = 4
    store: str = "same"
    capacity: int = 2**30
    memory: Memory = field(init=False, repr=False)

    @property
    def remembers(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise ValueError(f"{self.text}: store must be one of {', '.join(STORES)}, found {self.store!r}")
        self._whole = STORES[self.store]()
        self._change, self._gradient = Uniform(self.bits), Uniform(min(8, 2 * self.bits))
        self.memory = Memory(self.capacity)

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        require_floating(layout_of(x), self.text)
        if context.direction == "backward" and context.paired:
            return self._gradient.pack(x, context)
        if not context.training:
            return self._whole.blob(x, context), DIRECT
        samples, row = self._samples(x.shape, context), self._row(layout_of(x))
        x = x.reshape(len(samples), *row.shape)
        self.memory.begin(context.step)
        base = [self.memory.tag(sample, row) for sample in samples]
        known = [tag is not None for tag in base]
        old = torch.tensor(known, dtype=torch.bool, device=x.device)
        before = self.memory.rows(list(compress(samples, known)), row, x.device)
        work = work_dtype(x.dtype)
        changes = self._change.blob(x[old].to(work) - before.to(work), context)
        whole = self._whole.blob(x[~old], context)
        after = self._after(changes, whole, known, samples, Layout(tuple(x.shape), x.dtype), context)
        tags = fingerprints(after, samples)
        self.memory.put(samples, after, tags, context.micro_batch)
        said = [tag if tag is not None else new for tag, new in zip(base, tags, strict=True)]
        side = REMEMBERED + _flags(known) + b"".join(tag.to_bytes(4, "little") for tag in said)
        return torch.cat([changes, whole]), side + number(changes.numel())

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        require_floating(layout, self.text)
        if context.direction == "backward" and context.paired:
            return self._gradient.unpack(body, side, layout, context)
        if body.dtype != torch.uint8 or body.dim() != 1:
            raise ValueError(f"the frame is malformed: {self.text} has a body of bytes, found {layout_of(body)}")
        if side[:1] != (REMEMBERED if context.training else DIRECT):
            raise ValueError(f"{self.text}: one end of {self._transfer(context)} trains and the other does not")
        if not context.training:
            return self._part(self._whole, body, layout, context)
        samples, row = self._samples(layout.shape, context), self._row(layout)
        self.memory.begin(context.step)
        reader = Reader(side[1:])
        flags = int.from_bytes(reader.take(packed_bytes(len(samples), 1), "which samples are known"), "little")
        known = [bool(flags >> i & 1) for i in range(len(samples))]
        said = [int.from_bytes(reader.take(4, "a checksum"), "little") for _ in samples]
        changed = reader.number("the length of the changes")
        reader.end("the length of the changes")
        if changed > body.numel():
            raise ValueError(f"the frame is malformed: {changed} bytes of changes in a body of {body.numel()}")
        odd = [s for s, k, tag in zip(samples, known, said, strict=True) if k and self.memory.tag(s, row) != tag]
        if odd:
            raise OutOfStep(tuple(odd), self._transfer(context))
        whole = Layout((len(samples), *row.shape), layout.dtype)
        after = self._after(body[:changed], body[changed:], known, samples, whole, context)
        tags = fingerprints(after, samples)
        if any(not k and tag != new for k, tag, new in zip(known, said, tags, strict=True)):
            raise ValueError(f"{self._transfer(context)}: the two ends do not name the same samples in the same order")
        self.memory.put(samples, after, tags, context.micro_batch)
        return narrow(after, layout.dtype).view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        """With the samples in the context, by what is remembered of them; without, with every sample known."""
        require_floating(layout, self.text)
        if context.direction == "backward" and context.paired:
            return self._gradient.packed(layout, context)
        if not context.training:
            return Layout((blob_bytes(layout, *self._whole.packed(layout, context)),), torch.uint8), 1
        samples, row = by_sample(layout.shape)[0], self._row(layout)
        known = self._known(layout, row, context) if context.samples else samples
        whole = Layout((samples - known, *row.shape), layout.dtype)
        change = Layout((known, *row.shape), work_dtype(layout.dtype))
        changes = blob_bytes(change, *self._change.packed(change, context))
        body = changes + blob_bytes(whole, *self._whole.packed(whole, context))
        return Layout((body,), torch.uint8), 1 + packed_bytes(samples, 1) + 4 * samples + len(number(changes))

    def state_dict(self) -> dict[str, Tensor]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory.load_state_dict(state)

    def forget(self, samples: Collection[int] | None = None) -> None:
        self.memory.forget(samples)

    def _known(self, layout: Layout, row: Layout, context: Context) -> int:
        """How many samples of a frame are remembered."""
        samples = self._samples(layout.shape, context)
        self.memory.begin(context.step)
        return sum(self.memory.tag(sample, row) is not None for sample in samples)

    def _after(
        self, changes: Tensor, whole: Tensor, known: Sequence[bool], samples: Sequence[int], x: Layout, context: Context
    ) -> Tensor:
        """The memories after this frame, the same at both ends: from what travels and from what was remembered."""
        row, work = self._row(x), work_dtype(x.dtype)
        old = torch.tensor(known, dtype=torch.bool, device=changes.device)
        count = sum(known)
        before = self.memory.rows(list(compress(samples, known)), row, changes.device)
        change = self._part(self._change, changes, Layout((count, *row.shape), work), context)
        new = self._part(self._whole, whole, Layout((len(samples) - count, *row.shape), x.dtype), context)
        after = torch.empty((len(samples), *row.shape), dtype=row.dtype, device=changes.device)
        after[old] = narrow(before.to(work) + change, row.dtype)
        after[~old] = narrow(new, row.dtype)
        return after

    def _part(self, codec: Codec, data: Tensor, layout: Layout, context: Context) -> Tensor:
        x = codec.unblob(data, context)
        if layout_of(x) != layout:
            raise ValueError(f"the frame is malformed: {self.text} awaits {layout}, found {layout_of(x)}")
        return x

    def _row(self, x: Layout) -> Layout:
        """How a sample is remembered."""
        shape = x.shape[1:] if len(x.shape) > 1 else (x.numel,)
        return Layout(shape, self._whole.packed(x, Context())[0].dtype)

    def _samples(self, shape: Sequence[int], context: Context) -> tuple[int, ...]:
        rows, found = by_sample(tuple(shape))[0], context.samples
        if len(found) != rows:
            raise ValueError(
                f"{self.text} needs an id for each of {rows} samples of {self._transfer(context)}, found {len(found)}: "
                f"give them as Context(samples=...)"
            )
        if len(set(found)) < rows:
            raise ValueError(
                f"{self.text}: a sample occurs twice in {self._transfer(context)}, which its memory cannot hold"
            )
        return found


def _flags(known: Sequence[bool]) -> bytes:
    bits = sum(1 << i for i, k in enumerate(known) if k)
    return bits.to_bytes(packed_bytes(len(known), 1), "little")
