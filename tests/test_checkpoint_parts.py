"""Where shares of tensors lie in the whole: against brute force."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from merak_like.partitioner.tensor_parallel.layout import Axis, Layout, Segments, whole_size
from merak_like.runtime.checkpoint.boxes import Box, Held, Placement, boxes_of_run, parts, whole
from merak_like.runtime.checkpoint.contents import placement_of
from merak_like.runtime.checkpoint.planners import Saved, Writing
from merak_like.runtime.tensor_parallel.shards import Shards

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@settings(max_examples=200)
@given(SHAPES, st.data())
def test_run_of_numbers_is_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, numbers.numel()))
    stop = data.draw(st.integers(start, numbers.numel()))
    boxes = boxes_of_run(shape, start, stop)
    cut = [numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].flatten() for box in boxes]
    assert torch.cat([*cut, numbers.new_empty(0)]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_the_picture_in_the_docstring() -> None:
    assert boxes_of_run((4, 6), 5, 17) == [Box((0, 5), (1, 1)), Box((1, 0), (1, 6)), Box((2, 0), (1, 5))]


def halves(shape: tuple[int, ...], dim: int, rank: int, of: int = 1) -> tuple[Placement, list[slice]]:
    """A rank's half of each of ``of`` equal pieces of a dimension, as a fused projection over heads is sharded."""
    piece = shape[dim] // of
    sizes = tuple(piece // 2 if d == dim else n for d, n in enumerate(shape))
    blocks = []
    for number in range(of):
        here = tuple(number * piece // 2 if d == dim else 0 for d in range(len(shape)))
        at = tuple(number * piece + rank * piece // 2 if d == dim else 0 for d in range(len(shape)))
        blocks.append((Box(here, sizes), at))
    return Placement(shape, tuple(blocks)), [slice(at[dim], at[dim] + piece // 2) for _, at in blocks]


@settings(max_examples=100)
@given(st.integers(0, 2), st.sampled_from([1, 2]), st.integers(1, 5), st.booleans())
def test_shares_of_shards_make_up_the_whole(dim: int, of: int, replicas: int, sharded: bool) -> None:
    shape = tuple(4 * of if d == dim else 3 for d in range(3))
    source = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    found = torch.full_like(source, -1)
    for rank in range(2 if sharded else 1):
        placement, slices = halves(shape, dim, rank, of) if sharded else (whole(shape), [slice(None)])
        own = torch.cat([source[(slice(None),) * dim + (piece,)] for piece in slices], dim)
        runs = [(own.numel() * i // replicas, own.numel() * (i + 1) // replicas) for i in range(replicas)]
        for run in runs:
            flat = own.flatten()[run[0] : run[1]]
            for start, tensor in parts(flat, tuple(own.shape), placement, run):
                where = found[tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))]
                assert where.eq(-1).all(), "two shares hold one number"
                where.copy_(tensor)
        for start, tensor in parts(own, tuple(own.shape), placement):
            assert torch.equal(tensor, source[tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))])
    assert torch.equal(found, source)


def layouts(ranks: int) -> dict[str, Layout]:
    """A fused projection over heads, keys that pairs of ranks have in common, and both side by side in one weight."""
    heads, keys = Axis(4, degree=ranks), Axis(2, degree=2, repeat=ranks // 2)
    return {
        "fused": ((Axis(3), heads, Axis(2)), (Axis(5),)),
        "keys": ((Axis(5),), (keys, Axis(3))),
        "segments": ((Segments(((heads, Axis(2)), (keys, Axis(2)))),), (Axis(2),)),
    }


def held(whole_tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> tuple[dict[str, torch.Tensor], list[Held]]:
    """What a tensor-parallel rank has of some tensors, and as entries of a checkpoint."""
    shards = Shards(layouts(ranks), rank, ranks)
    own = {name: shards.cut(name, tensor) for name, tensor in whole_tensors.items()}
    places = {name: placement_of(shards, name, tuple(tensor.shape)) for name, tensor in own.items()}
    return own, [
        Held(f"model.{n}", places[n].shape, tuple(parts(t, tuple(t.shape), places[n]))) for n, t in own.items()
    ]


def test_shards_of_four_ranks_are_read_by_two_and_by_one(tmp_path: Path) -> None:
    """Through the files, in torch's format: each rank writes its own, and what several have in common is there once."""
    wholes = {
        name: torch.randn([whole_size(factors) for factors in layout]) for name, layout in layouts(4).items()
    }  # fmt: skip
    planners = [Writing(held(wholes, rank, 4)[1]) for rank in range(4)]
    writer = FileSystemWriter(tmp_path)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    results = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for planner, plan in zip(planners, writer.prepare_global_plan(plans), strict=True)
    ]
    writer.finish(metadata, results)
    empty = {name: torch.zeros_like(tensor) for name, tensor in wholes.items()}
    for rank in range(2):
        expected, _ = held(wholes, rank, 2)
        found, wanted = held(empty, rank, 2)
        saved = Saved(tmp_path)
        saved.check(wanted)
        saved.read(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    alone = [Held(f"model.{n}", s, tuple(parts(empty[n], s, whole(s)))) for n, s in shapes.items()]
    Saved(tmp_path).read(alone)
    assert all(torch.equal(empty[name], tensor) for name, tensor in wholes.items())
