"""How many bytes of tensors are alive at the most, whatever the allocator and the machine make of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from merak_like._compat import StorageWeakRef, TorchDispatchMode, storage_key, tree_leaves


class Peak(TorchDispatchMode):
    """Counts what ops make while it is on, looking whenever one makes a tensor of ``least`` bytes; not what an op needs
    inside of itself."""

    def __init__(self, before: Iterable[Tensor] = (), least: int = 0) -> None:
        """``before`` is there anyway and does not count."""
        super().__init__()
        self.most, self._least = 0, least
        self._held = tuple(before)  # or what comes after would get the names of what is gone
        self._before = {storage_key(tensor) for tensor in self._held}
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage_key(tensor)
            if key not in self._before and key not in self._seen:
                self._seen.add(key)
                self._alive.append((StorageWeakRef(storage), storage.nbytes()))
        if any(tensor.untyped_storage().nbytes() >= self._least for tensor in made):
            self._alive = [(one, size) for one, size in self._alive if not one.expired()]
            self._seen = {one.cdata for one, _ in self._alive}
            self.most = max(self.most, sum(size for _, size in self._alive))
        return out
