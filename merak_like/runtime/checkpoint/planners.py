"""The contents of a checkpoint in the format of ``torch.distributed.checkpoint``: blocks of named tensors.

A tensor that is held in parts by several ranks is one entry; whoever loads asks for the blocks it needs. DTensor is not
needed for that: the planners are a public way to say what is where.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)  # fmt: skip
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from merak_like.runtime.checkpoint.boxes import Held, Sizes


class Writing(SavePlanner):
    """Plans the writing of what this rank holds."""

    def __init__(self, held: Iterable[Held]) -> None:
        self.held = [one for one in held if one.parts]
        self._data: dict[tuple[str, Sizes], Tensor] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: what is held was told at the start."""

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for one in self.held:
            for part in one.parts:
                chunk = ChunkStorageMetadata(torch.Size(part.start), part.tensor.shape)
                data = TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(part.tensor), torch.Size(one.shape)
                )  # fmt: skip
                index = MetadataIndex(one.key, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._data[one.key, part.start] = part.tensor
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(_once(all_plans))
        for key, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            there = sum(prod(chunk.sizes) for chunk in entry.chunks)
            # tensor-parallel ranks may hold a part in common, but not begin it at one place
            assert there >= prod(entry.size), f"{key}: {there} of {prod(entry.size)} numbers are written"
        paths = {key: _path(key) for key in metadata.state_dict_metadata}
        return plans, replace(metadata, planner_data=paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._data[write_item.index.fqn, tuple(write_item.index.offset or ())]


def _path(key: str) -> tuple[str, ...]:
    """Where torch's own tools put an entry in nested dictionaries: by kind and name, an optimizer's also by its key."""
    kind, name = key.split(".", 1)
    return (kind, *name.rsplit(".", 1)) if kind == "optimizer" else (kind, name)


def _once(plans: list[SavePlan]) -> list[SavePlan]:
    """What several ranks hold is written by the first of them."""
    seen: set[MetadataIndex] = set()
    made: list[SavePlan] = []
    for plan in plans:
        items = [item for item in plan.items if item.index not in seen]
        seen.update(item.index for item in items)
        made.append(replace(plan, items=items))
    return made


class _Reading(LoadPlanner):
    """Plans the reading of what this rank needs."""

    def __init__(self, wanted: Iterable[Held], there: Mapping[str, Any]) -> None:
        self._into: dict[tuple[str, Sizes], Tensor] = {}
        self._items: list[ReadItem] = []
        for one in wanted:
            chunks = [ChunkStorageMetadata(torch.Size(p.start), p.tensor.shape) for p in one.parts]
            self._items.extend(create_read_items_for_chunk_list(one.key, there[one.key], chunks))
            self._into.update({(one.key, part.start): part.tensor for part in one.parts})

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing: what is wanted was told at the start."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self._into[read_item.dest_index.fqn, tuple(read_item.dest_index.offset or ())]
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was copied where it belongs."""


class Saved:
    """The tensors of a checkpoint that was verified."""

    def __init__(self, path: Any) -> None:
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.entries: dict[str, tuple[Sizes, torch.dtype]] = {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Shape and dtype of every tensor."""

    def check(self, wanted: Iterable[Held]) -> None:
        """Raise ValueError for what is not there, or has another shape."""
        there = self.entries
        missing = sorted({one.key for one in wanted} - there.keys())
        if missing:
            raise ValueError(f"the checkpoint has no {missing[:5]} ({len(missing)} missing): is it of this model?")
        for one in wanted:
            if there[one.key][0] != one.shape:
                raise ValueError(f"{one.key} has shape {one.shape}, in the checkpoint {there[one.key][0]}")

    @torch.no_grad()
    def read(self, wanted: Iterable[Held]) -> None:
        """Copy what is wanted into its place."""
        planner = _Reading(wanted, self._metadata.state_dict_metadata)
        self._reader.read_data(planner.create_local_plan(), planner)
