"""Memory that waits elsewhere: copied out and back beside the device's work, and counted.

    put    device memory --(stream out)--> the machine's, pinned; the device's is held until the copy is made
    get    the device's if it is still held; else <--(stream back)--, begun ``ahead`` bytes before it is read

Without streams, on a CPU, a copy is made as it is asked for.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """A tensor as a view of parked memory."""

    parked: Parked
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class Parked:
    """The memory behind some tensors of one forward."""

    def __init__(self, tensor: Tensor, room: Tensor, before: Parked | None) -> None:
        """``room`` is for its bytes in the other memory. ``before`` was kept just before: it is read after this one."""
        self.held: Tensor | None = tensor.detach()
        """On the device, while it is copied out."""
        self.version, self.device, self.room, self.before = tensor._version, tensor.device, room, before
        self.waiting = 0
        """Tensors that are views of it and were not read yet."""
        self.back: tuple[Tensor, Any] | None = None
        """Copied back, and the event after which it is."""

    @property
    def nbytes(self) -> int:
        """Of all the memory."""
        return self.room.nbytes

    def of(self, tensor: Tensor) -> Kept:
        """What stands for a tensor in this memory."""
        self.waiting += 1
        return Kept(self, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def leave(self) -> None:
        """Let go of the device's memory. Raises RuntimeError if it was changed while it was copied."""
        assert self.held is not None
        if self.held._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.held.shape)} that the backward needs was changed in place: its copy is "
                "not what the op kept"
            )
        self.held = None


@dataclass
class Counted:
    """Bytes."""

    out: int = 0
    """Copied out, in all."""
    back: int = 0
    """Copied back, in all."""
    held: int = 0
    """In the other memory now."""
    most: int = 0
    """That were there at once."""


class Parking:
    """The other memory, and the ways there and back."""

    def __init__(self) -> None:
        self.counted = Counted()
        self._leaving: deque[tuple[Parked, Any]] = deque()
        self._ways: dict[torch.device, tuple[Any, Any]] = {}

    def put(self, tensor: Tensor, before: Parked | None) -> Parked:
        """Start to copy the memory behind a tensor out; what is there by now leaves the device."""
        self._settle()
        device, nbytes, counted = tensor.device, tensor.untyped_storage().nbytes(), self.counted
        parked = Parked(tensor, torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda"), before)
        out, _ = self._streams(device)
        if out is not None:
            out.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(out) if out is not None else nullcontext():
            parked.room.copy_(_flat(tensor), non_blocking=True)
        self._leaving.append((parked, None if out is None else out.record_event()))
        counted.out, counted.held = counted.out + nbytes, counted.held + nbytes
        counted.most = max(counted.most, counted.held)
        weakref.finalize(parked, self._gone, nbytes)
        if out is None:
            self._settle()
        return parked

    def get(self, kept: Kept, ahead: int) -> Tensor:
        """The tensor, on the device; what was kept before it sets out, as much as ``ahead`` allows."""
        self._settle()
        parked = kept.parked
        if parked.held is not None:
            there = parked.held
        else:
            there, event = self._fetched(parked)
            if event is not None:
                current = torch.cuda.current_stream(parked.device)
                current.wait_event(event)
                there.record_stream(current)
        made = torch.empty(0, dtype=kept.dtype, device=parked.device)
        made.set_(there.untyped_storage(), kept.offset, kept.size, kept.stride)
        parked.waiting -= 1
        if parked.waiting <= 0:
            parked.back = None
        coming = parked.before
        while coming is not None and (ahead := ahead - coming.nbytes) >= 0:
            if coming.held is None and coming.waiting > 0:
                self._fetched(coming)
            coming = coming.before
        return made

    def _fetched(self, parked: Parked) -> tuple[Tensor, Any]:
        if parked.back is None:
            _, way = self._streams(parked.device)
            with torch.cuda.stream(way) if way is not None else nullcontext():
                room = torch.empty(parked.nbytes, dtype=torch.uint8, device=parked.device)
                room.copy_(parked.room, non_blocking=True)
            parked.back = room, None if way is None else way.record_event()
            self.counted.back += parked.nbytes
        return parked.back

    def _settle(self) -> None:
        while self._leaving and (self._leaving[0][1] is None or self._leaving[0][1].query()):
            self._leaving.popleft()[0].leave()

    def _gone(self, nbytes: int) -> None:
        self.counted.held -= nbytes

    def _streams(self, device: torch.device) -> tuple[Any, Any]:
        if device.type != "cuda":
            return None, None
        if device not in self._ways:
            self._ways[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._ways[device]


def _flat(tensor: Tensor) -> Tensor:
    """All the memory behind a tensor, as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
