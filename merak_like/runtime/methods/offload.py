"""What a stage keeps for its backward, in the machine's memory instead of the device's (vDNN: Rhu et al., MICRO 2016).

    forward     what an op keeps goes out over the link while the next ops run, and leaves the device when it is there
    backward    what is read soon comes back while later layers' gradients are computed: ``ahead`` bytes of it

Autograd's graph holds a ``Parked`` where it would hold a tensor. Memory goes out whole and once, however many tensors
are views of it, and comes back as the same views, so gradients are bitwise those of a stage that keeps everything.
Weights, buffers and small tensors stay. On a CPU both memories are one: the same code runs, and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merak_like._compat import StorageWeakRef, storage_key
from merak_like.partitioner.graph import ProxyGraph
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.by_blocks import ALL, ByBlocks
from merak_like.runtime.methods.method import Place
from merak_like.runtime.methods.parking import Parked, Parking
from merak_like.runtime.methods.planned_bytes import with_kept_elsewhere
from merak_like.runtime.methods.wrapped import AfterSum
from merak_like.runtime.stage_code import Piece

SMALLEST = 16 * 2**10
"""Bytes that are worth a copy of their own."""
BANDWIDTH = 20e9
"""Bytes a second between device and machine that the planner counts with: what PCIe 4.0 with 16 lanes reaches."""
AHEAD = 64 * 2**20
"""Bytes that come back before they are read."""


class Offload(ByBlocks):
    """Keeps activations of the modules whose path matches ``blocks``, all by default, in the machine's memory.

    With ``"auto"`` ``auto_parallel`` chooses among the blocks of the model those for which this costs less than to keep
    them, where they do not fit, or to compute them again; it may be none, and on a CPU always is.

    ``bandwidth`` is what the planner counts with; a copy costs it what the layer's own work does not hide. ``ahead``
    are bytes on their way back at once. What is computed again keeps nothing, so nothing of it goes out.
    """

    between_memories = True
    what = "some activations wait in the machine's memory"

    def __init__(self, blocks: str = ALL, *, bandwidth: float = BANDWIDTH, ahead: int = AHEAD) -> None:
        if bandwidth <= 0 or ahead < 0:
            raise ValueError(f"bandwidth={bandwidth}, ahead={ahead}: bytes a second above 0, bytes of at least 0")
        super().__init__(blocks)
        self.bandwidth, self.ahead = bandwidth, ahead
        self._parking: Parking | None = None
        self._inside = 0
        self._stays: set[int] = set()

    @property
    def parking(self) -> Parking:
        """Where activations are; it counts them."""
        if self._parking is None:
            self._parking = Parking()
        return self._parking

    def planned(self, graph: ProxyGraph, inside: tuple[str, ...] | None) -> ProxyGraph:
        """Bytes that are elsewhere, and seconds on the link."""
        return with_kept_elsewhere(graph, inside, SMALLEST, self.bandwidth)

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same; as a step begins it is known which memory is the model's own, and until the engine is closed when
        its blocks are called."""

        def begin() -> None:
            held = (*place.model.parameters(), *place.model.buffers())
            self._stays = {storage_key(tensor) for tensor in held if not tensor.is_meta}

        def end() -> None:
            for hook in hooks:
                hook.remove()

        begin()
        hooks: list[Any] = []
        for name in self.named(place.model) if self.blocks != ALL else ():
            for module in place.model.get_submodule(name).modules():
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave, always_call=True))
        return AfterSum(reducer, before=begin, end=end)

    def piece(self, piece: Piece) -> Piece:
        """Let go of what it keeps, unless it is run again."""
        if piece.again:
            return piece
        return replace(piece, module=_Parking(piece.module, self))  # type: ignore[arg-type]

    def takes(self, tensor: Tensor) -> bool:
        """Whether a kept tensor may go out: an activation, and no weight."""
        if self.blocks != ALL and not self._inside:
            return False
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        return plain and tensor.untyped_storage().nbytes() >= SMALLEST and storage_key(tensor) not in self._stays


class _Parking:
    """Code of a stage whose kept tensors go out, in the order in which they are kept."""

    def __init__(self, code: Callable[..., Any], method: Offload) -> None:
        self._code, self._method = code, method

    def __call__(self, *args: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return self._code(*args)
        parking, last = self._method.parking, None
        entered = {storage_key(arg) for arg in args}  # the stage holds them anyway
        known: dict[tuple[StorageWeakRef, int], Parked] = {}

        def pack(tensor: Tensor) -> Any:
            nonlocal last
            if not self._method.takes(tensor) or storage_key(tensor) in entered:
                return tensor
            memory = StorageWeakRef(tensor.untyped_storage()), tensor._version
            if memory not in known:
                last = known[memory] = parking.put(tensor, last)
            return known[memory].of(tensor)

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else parking.get(kept, self._method.ahead)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self._code(*args)
