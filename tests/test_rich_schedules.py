"""The schedules beyond GPipe and 1F1B: valid at any size, as drawn, as fast as their formulas, as full as they say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.schedules import AS_DATA, data_builder
from merak_like.partitioner.schedules.action import Kind, Schedule, chain
from merak_like.partitioner.schedules.dualpipe_v import dualpipe_v
from merak_like.partitioner.schedules.grid import from_csv, picture, to_csv
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers, split_backward
from merak_like.partitioner.schedules.scp import LADDER, recompute, recompute_apart, rung, scp
from merak_like.partitioner.schedules.v_shape import v_stage_rank
from merak_like.partitioner.schedules.validate import validate
from merak_like.partitioner.schedules.zb_h1 import zb_h1
from merak_like.partitioner.schedules.zb_h2 import zb_h2
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate

RANKS, MICRO_BATCHES = st.integers(1, 9), st.integers(1, 30)
SECONDS = st.floats(0.01, 10)


def equal(schedule: Schedule, f: float, b: float, w: float = 0.0, r: float = 0.0, hop: float = 0.0) -> Costs:
    """Costs of a rank, in equal parts for its stages; one byte for a micro-batch in a stage."""
    parts = schedule.stages // schedule.ranks
    cost = StageCosts(f / parts, b / parts, r / parts, w / parts, activation_bytes=1)
    return Costs((cost,) * schedule.stages, dict.fromkeys(chain(schedule.stages), hop))


def rank_peaks(schedule: Schedule) -> tuple[int, ...]:
    """Micro-batches alive at once on each rank, in any of its stages."""
    return simulate(schedule, equal(schedule, 1, 1)).rank_peak_bytes


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(AS_DATA)), ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_every_schedule_is_valid_at_any_size(name: str, ranks: int, micro_batches: int) -> None:
    schedule = AS_DATA[name](ranks, micro_batches)
    assert (schedule.ranks, schedule.micro_batches) == (ranks, micro_batches)
    edges = chain(schedule.stages)
    peak = validate(schedule)
    assert validate(add_transfers(schedule, edges), edges) == peak
    assert max(peak) <= micro_batches
    for rewritten in (split_backward(schedule), recompute_apart(recompute(schedule))):
        assert validate(rewritten) == peak
        assert rank_peaks(rewritten) == rank_peaks(schedule)


@settings(max_examples=40)
@given(ranks=RANKS, micro_batches=MICRO_BATCHES, chunks=st.integers(1, 5))
def test_any_number_of_stages_per_rank(ranks: int, micro_batches: int, chunks: int) -> None:
    schedule = interleaved(ranks, micro_batches, chunks)
    assert schedule.stage_rank == tuple(range(ranks)) * chunks
    validate(add_transfers(schedule, chain(schedule.stages)), chain(schedule.stages))


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(set(AS_DATA) - set(LADDER))), ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_torchs_csv_says_them_all(name: str, ranks: int, micro_batches: int) -> None:
    schedule = AS_DATA[name](ranks, micro_batches)
    assert from_csv(to_csv(schedule)) == schedule


# The pictures in the docstrings.


@pytest.mark.parametrize(
    ("build", "ranks", "micro_batches"),
    [(interleaved, 2, 4), (zb_h1, 3, 4), (zb_h2, 3, 6), (zb_v, 2, 3), (dualpipe_v, 2, 4), (scp, 4, 5)],
)
def test_the_picture_in_the_docstring_is_the_schedule(build, ranks: int, micro_batches: int) -> None:
    drawn = [line.strip() for line in build.__doc__.splitlines() if re.match(r" +(stage|rank) \d", line)]
    assert drawn == picture(build(ranks, micro_batches)).splitlines()


# Merak's ladder: f = r = 1, b = 2.

LADDER_TIMES = {  # (stages, micro-batches): 1F1B, then each pass
    (2, 8): (36, 35, 34, 33, 32),
    (4, 8): (44, 41, 40, 39, 38),
    (4, 16): (76, 73, 72, 71, 70),
    (8, 16): (92, 85, 84, 83, 82),
    (8, 32): (156, 149, 148, 147, 146),
}


@pytest.mark.parametrize(("size", "times"), LADDER_TIMES.items())
def test_each_pass_of_the_ladder_saves_what_it_says(size: tuple[int, int], times: tuple[int, ...]) -> None:
    builds = [lambda p, m: recompute(one_f_one_b(p, m)), *map(rung, LADDER)]
    schedules = [build(*size) for build in builds]
    assert tuple(simulate(s, equal(s, 1, 2, r=1)).makespan for s in schedules) == times
    assert schedules[-1] == scp(*size)


@settings(max_examples=60)
@given(p=st.integers(3, 8), m=st.integers(0, 12), f=st.floats(0.5, 2), b=st.floats(1, 4), share=st.floats(0, 1))
def test_closed_forms_of_the_ladder(p: int, m: int, f: float, b: float, share: float) -> None:
    """For m >= p and b >= f; exact where r = f, and never longer where r is a part of it."""
    m, b = m + p, b * f
    for r in (f, share * f):
        work = m * (f + r + b)
        bubbles = [simulate(s, equal(s, f, b, r=r)).makespan - work for s in (rung(name)(p, m) for name in LADDER)]
        forms = [
            (p - 1) * (f + b),
            (p - 2) * (f + b) + b + f - r,
            (p - 2) * (f + b) + max(0, b - r) + max(0, f - r),
            (p - 2) * (f + b) + max(0, b - f - r) + 2 * max(0, f - r),
        ]
        for bubble, form in zip(bubbles, forms, strict=True):
            assert bubble <= form + 1e-9 * work
            assert r < f or bubble == pytest.approx(form, abs=1e-9 * work)


ONE_F_ONE_B_WITH_RECOMPUTE = """
s0 F0@0 F1@1 F2@2 F3@3 B0@13 F4@16 B1@17 F5@20 B2@21 F6@24 B3@25 F7@28 B4@29 B5@33 B6@37 B7@41
s3 F0@3 B0@4 F1@7 B1@8 F2@11 B2@12 F3@15 B3@16 F4@19 B4@20 F5@23 B5@24 F6@27 B6@28 F7@31 B7@32
"""
SHIFTED_CRITICAL_PATH = """
s0 F0@0 F1@1 F2@2 F3@3 B0@10 F4@13 B1@14 F5@17 B2@18 F6@21 B3@22 F7@25 B4@26 R5@29 B5@30 R6@32 B6@33 R7@35 B7@36
s1 F0@1 F1@2 F2@3 R0@4 B0@8 F3@10 B1@11 F4@14 B2@15 F5@18 B3@19 F6@22 B4@23 F7@26 B5@27 R6@30 B6@31 R7@33 B7@34
s2 F0@2 F1@3 F2@4 R0@5 B0@6 R1@8 B1@9 F3@11 B2@12 F4@15 B3@16 F5@19 B4@20 F6@23 B5@24 F7@27 B6@28 R7@31 B7@32
s3 F0@3 B0@4 F1@6 B1@7 F2@9 B2@10 F3@12 B3@13 F4@16 B4@17 F5@20 B5@21 F6@24 B6@25 F7@28 B7@29
"""


def with_starts(schedule: Schedule) -> list[str]:
    entries = simulate(schedule, equal(schedule, 1, 2, r=1)).entries
    return [
        f"s{rank} " + " ".join(f"{e.action.kind.value}{e.action.micro_batch}@{e.start:g}" for e in row)
        for rank, row in enumerate(entries)
    ]


def test_the_worked_example_action_by_action() -> None:
    """Merak's table for p = 4, m = 8. It writes the last R and B of s2 as one (B7@31, 3 s): nothing lies between."""
    fused = with_starts(recompute(one_f_one_b(4, 8)))
    assert [fused[0], fused[3]] == ONE_F_ONE_B_WITH_RECOMPUTE.strip().splitlines()
    assert with_starts(scp(4, 8)) == SHIFTED_CRITICAL_PATH.strip().splitlines()
    assert scp(4, 8).peak_live() == (4, 3, 3, 1)


def test_which_stages_recompute_is_an_argument() -> None:
    some = scp(4, 8, recomputes=(0, 1))
    assert {stage for _, stage in some.apart(Kind.R)} | some.recomputes == {0, 1}
    assert scp(4, 8, recomputes=()).apart(Kind.R) == set()
    with pytest.raises(ValueError, match="stage 9 cannot recompute: there are stages 0 to 3"):
        scp(4, 8, recomputes=(9,))


# Closed forms (Narayanan et al. 2021, section 2.2; Qi et al. 2024, section 2 and appendix), and memory.


@settings(max_examples=60)
@given(ranks=RANKS, groups=st.integers(1, 5), chunks=st.integers(1, 5), forward=SECONDS, backward=SECONDS)
def test_interleaving_divides_the_bubble(ranks: int, groups: int, chunks: int, forward: float, backward: float) -> None:
    schedule = interleaved(ranks, groups * ranks, chunks)
    time = (groups * ranks + (ranks - 1) / chunks) * (forward + backward)
    assert simulate(schedule, equal(schedule, forward, backward)).makespan == pytest.approx(time, rel=1e-9)
    if chunks > 1:
        peak = [(ranks - 1 - rank) * 2 + (chunks - 1) * ranks + 1 for rank in range(ranks)]
        assert rank_peaks(schedule) == tuple(min(each, groups * ranks * chunks) for each in peak)
    for short in range(1, ranks):
        fewer = interleaved(ranks, groups * ranks - short, chunks)
        assert simulate(fewer, equal(fewer, forward, backward)).makespan <= time * (1 + 1e-9)


def split_costs() -> dict[str, st.SearchStrategy[float]]:
    """The weight gradient is the shortest, as in every profile; hops are short."""
    return {"f": st.floats(1, 2), "b": st.floats(1, 2), "w": st.floats(0.1, 1), "hop": st.floats(0, 0.1)}


@settings(max_examples=60)
@given(p=st.integers(1, 8), more=st.integers(0, 12), **split_costs())
def test_bubble_of_zb_h1(p: int, more: int, f: float, b: float, w: float, hop: float) -> None:
    m, hop = 2 * p + more, min(hop, w / 2)  # a W hides the way there and back
    schedule = zb_h1(p, m)
    time = m * (f + b + w) + (p - 1) * (f + b - w + 4 * hop)
    assert simulate(schedule, equal(schedule, f, b, w, hop=hop)).makespan == pytest.approx(time, rel=1e-9)
    assert rank_peaks(schedule) == (p,) * p


@settings(max_examples=60)
@given(p=st.integers(1, 8), more=st.integers(0, 12), **split_costs())
def test_bubble_of_zb_h2(p: int, more: int, f: float, b: float, w: float, hop: float) -> None:
    m = 3 * p + more
    schedule = zb_h2(p, m)
    timeline = simulate(schedule, equal(schedule, f, b, w, hop=hop))
    span = m * (f + b + w) + (p - 1) * max(0, f + b + 2 * hop - 2 * w)
    assert timeline.span == pytest.approx(span, rel=1e-9)
    assert rank_peaks(schedule) == (2 * p - 1,) * p


@pytest.mark.parametrize("p", range(2, 9))
def test_zb_v_waits_only_for_the_first_micro_batch(p: int) -> None:
    for m in range(2 * p - 1, 4 * p):
        schedule = zb_v(p, m)
        assert simulate(schedule, equal(schedule, 1, 1, 1)).makespan == pytest.approx(3 * m + (p - 1) / 2)
        assert rank_peaks(schedule) == (2 * p,) * p
        assert schedule.stage_rank == v_stage_rank(p)


@pytest.mark.parametrize("p", range(2, 9))
def test_dualpipe_v_holds_one_more_stage_of_a_micro_batch(p: int) -> None:
    assert rank_peaks(dualpipe_v(p, 4 * p)) == (2 * p + 1,) * p


# Names.


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'zbv': did you mean 'zb-v'"):
        data_builder("zbv")
    with pytest.raises(ValueError, match="at least one stage: got 0 chunks"):
        interleaved(2, 4, 0)
    for build in AS_DATA.values():
        with pytest.raises(ValueError, match="at least one stage and one micro-batch"):
            build(2, 0)


@pytest.mark.parametrize("name", [*LADDER])
def test_the_receive_of_a_gradient_is_posted_before_the_recompute_that_hides_it(name: str) -> None:
    schedule = add_transfers(AS_DATA[name](4, 8), chain(4))
    hidden = 0
    for order in schedule.orders:
        place = {action: at for at, action in enumerate(order)}
        for action in order:
            again = action._replace(kind=Kind.R, peer=-1)
            if action.kind is Kind.RECV_B and order[place[action._replace(kind=Kind.B, peer=-1)] - 1] == again:
                assert place[action] < place[again]
                hidden += 1
    assert hidden
