"""Dimensions as products of axes, and how the parts of a sharded dimension lie on the ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim
from merak_like.partitioner.tensor_parallel.layout import (
    Axis,
    Factors,
    Segments,
    is_sharded,
    local_size,
    pieces,
    same_parts,
    whole_size,
)
from merak_like.partitioner.tensor_parallel.ranks import take


def sizes(axes: Axes, dim: Dim) -> list[int]:
    return [axes.size((axis,)) for axis in axes.resolve(dim)]


def test_a_view_splits_an_axis_everywhere() -> None:
    axes = Axes()
    fused = axes.fresh(48)
    heads = axes.fresh(4)
    axes.unify(fused, (*axes.fresh(3, "taken apart"), *heads, *axes.fresh(4)))
    assert sizes(axes, fused) == [3, 4, 4]
    assert [axes.pinned(axis) for axis in axes.resolve(fused)] == ["taken apart", "", ""]
    assert axes.resolve(fused)[1] == axes.root(heads[0])


def test_what_does_not_divide_is_pinned_with_its_reason() -> None:
    axes = Axes()
    one, other = axes.fresh(6) + axes.fresh(4), axes.fresh(4) + axes.fresh(6)
    axes.unify(one, other, "6 and 4")
    assert {axes.pinned(axis) for dim in (one, other) for axis in axes.leaves(dim)} == {"6 and 4"}


def test_pins_survive_merging_and_refining() -> None:
    axes = Axes()
    free, pinned = axes.fresh(8), axes.fresh(8, "a reason")
    axes.unify(free, pinned)
    axes.unify(free, axes.fresh(2) + axes.fresh(4))
    assert [axes.pinned(axis) for axis in axes.leaves(free)] == ["a reason"] * 2


def test_unequal_parts_are_segments_that_keep_their_own_axes() -> None:
    axes = Axes()
    fused, heads = axes.fresh(32), axes.fresh(2)
    query, key, value = (axes.part(fused, a, b, "no") for a, b in ((0, 16), (16, 24), (24, 32)))
    axes.unify(query, heads + axes.fresh(2) + axes.fresh(4))
    for part in (key, value):
        axes.unify(part, heads + axes.fresh(4))
    (row,) = axes.resolve(fused)
    assert [sizes(axes, part) for part in axes.segments(row)] == [[2, 2, 4], [2, 4], [2, 4]]
    assert len({axes.resolve(part)[0] for part in axes.segments(row)}) == 1
    assert not any(axes.pinned(axis) for axis in axes.leaves(fused))


def test_halves_turned_around_are_the_same_axis() -> None:
    """Rotary embeddings: x * cos + cat(-second half, first half) * sin."""
    axes = Axes()
    head = axes.fresh(16)
    first, second = axes.part(head, 0, 8, "no"), axes.part(head, 8, 16, "no")
    axes.unify(head, axes.row((second, first)))
    assert axes.resolve(first) == axes.resolve(second)
    assert not any(axes.pinned(axis) for axis in axes.leaves(head))


def test_a_row_of_segments_that_divide_is_refined_as_one() -> None:
    axes = Axes()
    row = axes.row((axes.fresh(16), axes.fresh(8)))
    axes.unify(row, axes.fresh(6) + axes.fresh(4))
    assert sizes(axes, row) == [6, 4]
    assert [axes.size(part) for part in axes.segments(axes.resolve(row)[0])] == [4, 2]


def test_a_range_inside_a_pinned_axis_leaves_the_faster_axes_alone() -> None:
    axes = Axes()
    whole, heads = axes.fresh(3, "taken apart"), axes.fresh(8)
    part = axes.part(whole + heads, 8, 16, "no")
    assert axes.resolve(part) == axes.resolve(heads)


FUSED: Factors = (Axis(3), Axis(4, 2), Axis(2))
UNEQUAL: Factors = (Segments(((Axis(4, 2), Axis(2)), (Axis(2),), (Axis(2),))),)


def test_a_fused_dimension_lies_in_strips() -> None:
    assert pieces(FUSED, 0) == ((0, 4), (8, 12), (16, 20))
    assert pieces(FUSED, 1) == ((4, 8), (12, 16), (20, 24))
    assert take(torch.arange(24), (FUSED,), 1).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_segments_that_nobody_divides_are_on_every_rank() -> None:
    assert pieces(UNEQUAL, 0) == ((0, 4), (8, 12))
    assert pieces(UNEQUAL, 1) == ((4, 12),)
    assert local_size(UNEQUAL) == 8
    assert same_parts(UNEQUAL, 2, 1, 2) == ((4, 6), (6, 8))
    assert same_parts(FUSED, 2, 1, 2) == ()


def test_two_groups_divide_heads_and_their_queries() -> None:
    query: Factors = (Axis(2, 2, 2), Axis(4, 2, 1))
    key: Factors = (Axis(2, 2, 2),)
    assert [pieces(query, rank) for rank in range(4)] == [((0, 2),), ((2, 4),), ((4, 6),), ((6, 8),)]
    assert [pieces(key, rank) for rank in range(4)] == [((0, 1),), ((0, 1),), ((1, 2),), ((1, 2),)]


FACTORS = st.recursive(
    st.lists(st.builds(Axis, st.sampled_from([1, 3, 5])) | st.builds(Axis, st.sampled_from([2, 4, 8]), st.just(2)),
             min_size=1, max_size=3).map(tuple),
    lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda parts: (Segments(tuple(parts)),)),
    max_leaves=6,
)  # fmt: skip


def uses_rank_once(factors: Factors) -> bool:
    """Two sharded axes never meet in one product."""
    count = 0
    for factor in factors:
        if isinstance(factor, Segments):
            if not all(map(uses_rank_once, factor.parts)):
                return False
            count += is_sharded((factor,))
        else:
            count += factor.degree > 1
    return count <= 1


@settings(max_examples=200)
@given(FACTORS.filter(uses_rank_once))
def test_the_ranks_parts_make_up_the_dimension(factors: Factors) -> None:
    held = [[i for start, stop in pieces(factors, rank) for i in range(start, stop)] for rank in range(2)]
    assert all(len(part) == local_size(factors) for part in held)
    assert sorted({*held[0], *held[1]}) == list(range(whole_size(factors)))
    both = {*held[0]} & {*held[1]}
    same = [held[0][i] for start, stop in same_parts(factors, 2, 1, 2) for i in range(start, stop)]
    assert sorted(same) == (sorted(both) if is_sharded(factors) else [])


def test_a_whole_dimension_has_no_parts() -> None:
    assert pieces((Axis(6),), 1) == ((0, 6),)
