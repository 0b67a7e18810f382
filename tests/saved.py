"""Counts the bytes that an engine keeps for its backwards, action by action: what a plan predicts is held up to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from merak_like import Engine
from merak_like.runtime.stage import Stage


class Box:
    """Stands for a saved tensor in autograd's graph, and goes with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Meter:
    """The most bytes kept at once, each storage once, and of the batch each part: a device has a copy of that.

    Parameters and buffers are not counted.
    """

    def __init__(self, engine: Engine, batch: Mapping[str, Tensor]) -> None:
        self.peak = 0
        self._engine = engine
        self._boxes: WeakSet[Box] = WeakSet()
        self._batch = {t.untyped_storage().data_ptr() for t in batch.values()}
        lasting = (*engine.model.parameters(), *engine.model.buffers())
        self._lasting = {t.untyped_storage().data_ptr() for t in lasting if not t.is_meta}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a step."""

        def pack(tensor: Tensor) -> Box:
            box = Box(tensor)
            self._boxes.add(box)
            return box

        again, originals = Stage.recompute, dict(self._engine._do)

        def recompute(stage: Stage, micro_batch: int) -> None:
            again(stage, micro_batch)
            self.look()

        def looking(do: Any) -> Any:
            def done(action: Any) -> None:
                do(action)
                self.look()

            return done

        self._engine._do = {kind: looking(do) for kind, do in originals.items()}
        Stage.recompute = recompute  # type: ignore[method-assign]
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
                yield
        finally:
            Stage.recompute, self._engine._do = again, originals  # type: ignore[method-assign]

    def look(self) -> None:
        """Count what is kept now."""
        storages = {}
        for tensor in (*(box.tensor for box in self._boxes), *self._held()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._batch:
                storages[tensor.data_ptr()] = tensor.nbytes
            elif storage.data_ptr() not in self._lasting:
                storages[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(storages.values()))

    def _held(self) -> Iterable[Tensor]:
        stages: dict[int, Any] = {id(s): s for program in self._engine._running for s in program.stages.values()}
        for stage in stages.values():
            for live in stage.live.values():
                yield from (*live.received.values(), *live.made.values())
                for again in live.again:
                    yield from (*again.kept, *again.entered)
            for later in stage.waiting.values():
                yield from later.held
