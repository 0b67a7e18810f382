"""The schedule built for its costs: never slower than those known by name, the optimum where all can be tried."""

from __future__ import annotations

import time
from random import Random

import pytest

from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import Kind, Schedule, chain
from merak_like.partitioner.schedules.auto.build import Found, auto
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import recompute, recompute_apart, scp
from merak_like.partitioner.schedules.validate import validate
from merak_like.partitioner.schedules.zb_h1 import zb_h1
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.brute_force import fastest, fastest_by_simulation
from tests.test_zero_bubble_paper import RANKS, Row, bubble, costs_of, profiles


def uneven(random: Random, stages: int, *, recomputes: bool, splits: bool, hops: bool = True) -> Costs:
    """Stages of which some take three times as long as others."""

    def seconds(wanted: bool = True) -> float:
        return random.uniform(0.5, 1.5) if wanted else 0.0

    costs = tuple(
        StageCosts(seconds(), 2 * seconds(), seconds(recomputes), seconds(splits), activation_bytes=1)
        for _ in range(stages)
    )
    return Costs(costs, {edge: random.uniform(0, 0.3) for edge in sorted(chain(stages)) if hops})


def check(found: Found, costs: Costs) -> None:
    """It is valid, takes what it says in the real simulator, and no less than its bound."""
    validate(add_transfers(found.schedule, chain(found.schedule.stages)))
    assert simulate(found.schedule, costs).makespan == pytest.approx(found.makespan, rel=1e-12)
    assert found.bound <= found.makespan
    assert found.gap == pytest.approx(found.makespan / found.bound - 1, abs=1e-8)


# Against the schedules known by name.


def compare(seed: int, ranks: int, micro_batches: int, effort: float) -> None:
    """One schedule's memory is the limit; all that keep it, with their recompute inside B or apart, are the rivals."""
    random = Random(seed)
    name = random.choice(sorted(AS_DATA))
    limiting = AS_DATA[name](ranks, micro_batches)
    recomputes = frozenset(stage for _, stage in limiting.apart(Kind.R)) | limiting.recomputes
    if not recomputes and random.random() < 0.5:
        recomputes = frozenset(random.sample(range(limiting.stages), random.randint(1, limiting.stages)))
    costs = uneven(random, limiting.stages, recomputes=True, splits=random.random() < 0.5)
    live = simulate(limiting, costs).rank_peak_bytes
    found = auto(costs, micro_batches, stage_rank=limiting.stage_rank, live=live, recomputes=recomputes, effort=effort)
    check(found, costs)
    held = simulate(found.schedule, costs).rank_peak_bytes
    assert all(mine <= limit for mine, limit in zip(held, live, strict=True))
    rivals = [build(ranks, micro_batches) for build in AS_DATA.values()]
    for rival in (each for each in rivals if each.stage_rank == limiting.stage_rank):
        for form in (rival, recompute(rival, recomputes), recompute_apart(recompute(rival, recomputes))):
            does = frozenset(stage for _, stage in form.apart(Kind.R)) | form.recomputes
            if does == recomputes:
                timeline = simulate(form, costs)
                if all(theirs <= limit for theirs, limit in zip(timeline.rank_peak_bytes, live, strict=True)):
                    assert found.makespan <= timeline.makespan * (1 + 1e-9), (seed, name)


@pytest.mark.parametrize("seed", range(40))
def test_never_slower_than_what_is_known_by_name(seed: int) -> None:
    random = Random(seed)
    compare(1000 + seed, random.randint(2, 8), random.randint(1, 20), effort=0.05)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_never_slower_on_500_random_pipelines() -> None:
    random = Random(0)
    for seed in range(500):
        compare(seed, random.randint(2, 16), random.randint(1, 64), effort=0.1)


@pytest.mark.parametrize("size", [(2, 8), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_the_shifted_critical_path_is_the_optimum_and_needs_less_memory(size: tuple[int, int]) -> None:
    """f = r = 1, b = 2, all but the last stage recompute: no order is faster, but one that recomputes two micro-batches
    before the first gradient comes is as fast in the memory of 1F1B."""
    stages, micro_batches = size
    costs = Costs((StageCosts(1, 2, recompute=1),) * stages)
    shifted = simulate(scp(*size), costs)
    live = [min(micro_batches, stages - stage) for stage in range(stages)]
    found = auto(costs, micro_batches, recomputes=range(stages - 1), live=live, effort=0.3)
    assert found.makespan == found.bound == shifted.makespan
    assert found.schedule.peak_live() <= tuple(live) < shifted.peak_live


@profiles
def test_published_searches_are_matched(row: Row) -> None:
    """ZB-1p is Zero Bubble's own search in the memory of 1F1B."""
    m, costs = int(row["micro_batches"]), costs_of(row)
    found = auto(costs, m, live=[RANKS] * RANKS, effort=0.3)
    assert found.makespan <= simulate(zb_h1(RANKS, m), costs).makespan
    assert bubble(row, found.makespan) <= float(row["zb-1p"])


# Against all orders.


def small(seed: int, actions: int) -> tuple[Costs, int, tuple[int, ...], list[int]]:
    """At most 3 ranks and 4 micro-batches; one or two stages per rank, in turns or as a V; any memory that suffices."""
    random = Random(seed)
    while True:
        ranks, micro_batches, chunks = random.randint(1, 3), random.randint(1, 4), random.choice((1, 1, 1, 2))
        recomputes, splits = random.random() < 0.4, random.random() < 0.4
        if ranks * chunks * micro_batches * (2 + recomputes + splits) <= actions:
            break
    stage_rank = tuple(range(ranks)) * chunks if random.random() < 0.5 else (*range(ranks), *reversed(range(ranks)))
    stage_rank = stage_rank[: ranks * chunks]
    costs = uneven(random, ranks * chunks, recomputes=recomputes, splits=splits, hops=random.random() < 0.7)
    return costs, micro_batches, stage_rank, [random.randint(chunks, chunks * micro_batches + 1) for _ in range(ranks)]


def compare_with_all(seed: int, actions: int) -> None:
    costs, micro_batches, stage_rank, live = small(seed, actions)
    found = auto(costs, micro_batches, stage_rank=stage_rank, live=live)
    check(found, costs)
    assert fastest(costs, micro_batches, stage_rank, live, below=found.makespan) == found.makespan
    assert found.gap == 0


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_of_small_pipelines(seed: int) -> None:
    compare_with_all(seed, actions=24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_optimum_of_many_small_pipelines() -> None:
    for seed in range(1000, 1300):
        compare_with_all(seed, actions=48)


@pytest.mark.parametrize("seed", range(12))
def test_the_brute_force_is_right(seed: int) -> None:
    """Against the simulator on every order of every rank, micro-batches not in turn."""
    random = Random(seed)
    recomputes, splits = random.choice(((False, False), (True, False), (False, True)))
    costs = uneven(random, 2, recomputes=recomputes, splits=splits)
    micro_batches = 2 if recomputes or splits else random.choice((2, 3))
    stage_rank, live = (0, 1), [random.randint(1, 3), random.randint(1, 3)]
    every = fastest_by_simulation(costs, micro_batches, stage_rank, live)
    assert fastest(costs, micro_batches, stage_rank, live) == pytest.approx(every, rel=1e-12)
    assert auto(costs, micro_batches, live=live).makespan == pytest.approx(every, rel=1e-12)


# What it promises besides.


def test_the_same_costs_give_the_same_order() -> None:
    costs = uneven(Random(3), 4, recomputes=True, splits=True)
    assert auto(costs, 6, live=[4] * 4, effort=0.2) == auto(costs, 6, live=[4] * 4, effort=0.2)


def test_memory_counts_bytes_of_each_part() -> None:
    """Recomputing stages hold a tenth until R, so that a limit of bytes lets more micro-batches in than one of live."""
    cost = StageCosts(1, 2, recompute=1, activation_bytes=10, kept_bytes=1)
    costs = Costs((cost,) * 4)
    tight = auto(costs, 8, memory=[14] * 4)
    assert max(simulate(tight.schedule, costs).rank_peak_bytes) <= 14
    assert tight.schedule.peak_live()[0] >= 4
    assert auto(costs, 8, live=[1] * 4).makespan > tight.makespan
    split = Costs((StageCosts(1, 1, weight=1, activation_bytes=10, weight_bytes=2),) * 3)
    assert max(simulate(auto(split, 6, memory=[22] * 3).schedule, split).rank_peak_bytes) <= 22


def test_too_little_memory_is_refused_with_what_it_takes() -> None:
    costs = uneven(Random(0), 4, recomputes=False, splits=False)
    with pytest.raises(ValueError, match="rank 1 needs 2 for one micro-batch and has 1"):
        auto(costs, 4, stage_rank=(0, 1, 1, 0), live=[2, 1])
    with pytest.raises(ValueError, match="3 limits of memory for 4 ranks: give one each"):
        auto(costs, 4, live=[1, 1, 1])
    with pytest.raises(ValueError, match="either live micro-batches or bytes, not both"):
        auto(costs, 4, live=[4] * 4, memory=[4] * 4)


def test_one_micro_batch_at_a_time_is_always_possible() -> None:
    costs = uneven(Random(1), 6, recomputes=True, splits=True)
    for stage_rank in ((0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0), tuple(range(6)), (0,) * 6):
        ranks = max(stage_rank) + 1
        found = auto(
            costs, 3, stage_rank=stage_rank, live=[stage_rank.count(rank) for rank in range(ranks)], effort=0.1
        )
        check(found, costs)


def test_a_backward_is_split_only_where_it_may_be() -> None:
    costs = uneven(Random(2), 3, recomputes=False, splits=True)
    whole, parts = auto(costs, 3, split=False), auto(costs, 3)
    assert not whole.schedule.apart(Kind.W)
    assert parts.makespan <= whole.makespan == pytest.approx(simulate(whole.schedule, costs).makespan)


def test_three_stages_per_rank() -> None:
    costs = uneven(Random(4), 6, recomputes=False, splits=False)
    known: Schedule = interleaved(2, 4, 3)
    live = simulate(known, costs).rank_peak_bytes
    assert auto(costs, 4, stage_rank=known.stage_rank, live=live).makespan <= simulate(known, costs).makespan


def test_a_big_order_is_built_in_seconds() -> None:
    costs = uneven(Random(5), 16, recomputes=True, splits=True)
    start = time.process_time()
    found = auto(costs, 128, live=[16] * 16)
    assert time.process_time() - start < 5
    assert found.gap < 0.25
