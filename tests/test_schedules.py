"""Schedules as data: their pictures, the transfers pass, what validate accepts and refuses."""

from collections import defaultdict
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.schedules import data_builder
from merak_like.partitioner.schedules.action import RECEIVE_OF, USER_OF, Action, Kind, Schedule, chain
from merak_like.partitioner.schedules.gpipe import gpipe
from merak_like.partitioner.schedules.grid import picture
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.validate import validate
from tests.schedule_cases import random_edges, random_schedule, schedule_of

SIZES = {"stages": st.integers(1, 6), "micro_batches": st.integers(1, 9)}
PLAIN = {"gpipe": gpipe, "1f1b": one_f_one_b}
SEEDS = st.integers(0, 2**32 - 1)


def lines(text: str) -> str:
    """A drawing as a test writes it: no indent, no blank lines at either end."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def words(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, order)) for order in schedule.orders]


# The promise: every schedule we can build is valid, with and without transfers, and holds what it says.


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(PLAIN)), seed=SEEDS, **SIZES)
def test_every_schedule_is_valid_with_any_edges(name: str, seed: int, stages: int, micro_batches: int) -> None:
    schedule = PLAIN[name](stages, micro_batches)
    edges = random_edges(Random(seed), stages)
    peak = validate(schedule, edges)
    assert validate(add_transfers(schedule, edges), edges) == peak
    gpipe_peak, one_f_one_b_peak = micro_batches, [min(micro_batches, stages - stage) for stage in range(stages)]
    assert peak == {"gpipe": (gpipe_peak,) * stages, "1f1b": tuple(one_f_one_b_peak)}[name]


@settings(max_examples=60)
@given(seed=SEEDS, ranks=st.integers(1, 4), ahead=st.integers(0, 3), **SIZES)
def test_any_order_that_can_run_stays_valid_with_transfers(
    seed: int, ranks: int, ahead: int, stages: int, micro_batches: int
) -> None:
    random = Random(seed)
    edges = random_edges(random, stages)
    schedule = random_schedule(random, edges, stages, micro_batches, ranks)
    transferred = add_transfers(schedule, edges, ahead=ahead)
    assert validate(transferred, edges) == validate(schedule, edges)
    computed = [tuple(action for action in order if action.peer < 0) for order in transferred.orders]
    assert tuple(computed) == schedule.orders
    assert channel_orders(transferred, RECEIVE_OF) == channel_orders(transferred, USER_OF)


def channel_orders(schedule: Schedule, kinds: dict[Kind, Kind]) -> dict[tuple[int, int], list[Action]]:
    """The transfers of each ordered pair of ranks, as the senders or as the receivers order them, named by the send."""
    orders: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, order in enumerate(schedule.orders):
        for action in order:
            if action.kind in kinds:
                peer_rank = schedule.stage_rank[action.peer]
                sends = action.kind in RECEIVE_OF
                orders[(rank, peer_rank) if sends else (peer_rank, rank)].append(action if sends else action.match)
    return orders


# The pictures.

GPIPE = """
    stage 0  F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
    stage 1  .. F0 F1 F2 F3 .. .. B0 B1 B2 B3
    stage 2  .. .. F0 F1 F2 F3 B0 B1 B2 B3
"""
ONE_F_ONE_B = """
    stage 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    stage 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3
"""
FEWER_MICRO_BATCHES_THAN_STAGES = """
    stage 0  F0 F1 .. .. .. .. .. B0 .. B1
    stage 1  .. F0 F1 .. .. .. B0 .. B1
    stage 2  .. .. F0 F1 .. B0 .. B1
    stage 3  .. .. .. F0 B0 F1 B1
"""


@pytest.mark.parametrize(
    ("build", "stages", "micro_batches", "drawing"),
    [
        (gpipe, 3, 4, GPIPE),
        (one_f_one_b, 3, 4, ONE_F_ONE_B),
        (one_f_one_b, 1, 2, "stage 0  F0 B0 F1 B1"),
        (one_f_one_b, 4, 2, FEWER_MICRO_BATCHES_THAN_STAGES),
    ],
)
def test_a_schedule_looks_like_its_picture(build, stages: int, micro_batches: int, drawing: str) -> None:
    assert picture(build(stages, micro_batches)) == lines(drawing)


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_the_picture_in_the_docstring_is_the_schedule(build) -> None:
    for line in picture(build(3, 4)).splitlines():
        assert f"    {line}" in build.__doc__


def test_transfers_follow_and_precede_what_they_serve() -> None:
    schedule = add_transfers(one_f_one_b(2, 2), chain(2))
    drawing = str(schedule)
    assert drawing == lines("""
        rank 0  F0.0 SEND_F0.0>1 RECV_B0.0<1 F1.0 SEND_F1.0>1 RECV_B1.0<1 B0.0 B1.0
        rank 1  RECV_F0.1<0 F0.1 RECV_F1.1<0 B0.1 SEND_B0.1>0 F1.1 B1.1 SEND_B1.1>0
    """)
    for line in drawing.splitlines():
        assert line in (add_transfers.__doc__ or "")


def test_a_skipping_value_goes_straight_to_each_stage_that_uses_it() -> None:
    schedule = add_transfers(gpipe(3, 1), chain(3) | {(0, 2)})
    assert words(schedule) == [
        "RECV_B0.0<1 RECV_B0.0<2 F0.0 SEND_F0.0>1 SEND_F0.0>2 B0.0",
        "RECV_F0.1<0 RECV_B0.1<2 F0.1 SEND_F0.1>2 B0.1 SEND_B0.1>0",
        "RECV_F0.2<0 RECV_F0.2<1 F0.2 B0.2 SEND_B0.2>0 SEND_B0.2>1",
    ]


def test_stages_of_one_rank_hand_over_without_a_transfer() -> None:
    v_shape = schedule_of("F0.0 F0.3 B0.3 B0.0", "F0.1 F0.2 B0.2 B0.1", micro_batches=1, stage_rank=(0, 1, 1, 0))
    assert words(add_transfers(v_shape, chain(4), ahead=0)) == [
        "F0.0 SEND_F0.0>1 RECV_F0.3<2 F0.3 B0.3 SEND_B0.3>2 RECV_B0.0<1 B0.0",
        "RECV_F0.1<0 F0.1 F0.2 SEND_F0.2>3 RECV_B0.2<3 B0.2 B0.1 SEND_B0.1>0",
    ]


def test_a_value_used_late_is_received_in_the_order_it_was_sent() -> None:
    """Stage 1 takes micro-batch 1 first: micro-batch 0, sent first, must be received first or they would be swapped."""
    crossed = schedule_of("F0.0 F1.0 B0.0 B1.0", "F1.1 F0.1 B0.1 B1.1", micro_batches=2, stage_rank=(0, 1))
    assert words(add_transfers(crossed, chain(2), ahead=0))[1].startswith("RECV_F0.1<0 RECV_F1.1<0 F1.1 F0.1 ")


# What is refused, and how it is said.

GOOD = one_f_one_b(2, 2)
SENT = add_transfers(GOOD, chain(2))


def with_order(schedule: Schedule, rank: int, order: str) -> Schedule:
    orders = list(schedule.orders)
    orders[rank] = tuple(Action.parse(word) for word in order.split())
    return replace(schedule, orders=tuple(orders))


REFUSED = {
    "duplicate": (with_order(GOOD, 1, "F0.1 B0.1 F0.1 F1.1 B1.1"), "F0.1 is there twice", "F0.1 <-- ERROR HERE F1.1"),
    "missing": (with_order(GOOD, 1, "F0.1 B0.1 F1.1"), "B1.1 is missing on rank 1", "F1.1 <-- ERROR HERE"),
    "wrong rank": (with_order(GOOD, 1, "F0.0 B0.1"), "F0.0 is on rank 1, but stage 0 runs on rank 0", "F0.0 <--"),
    "out of range": (with_order(GOOD, 1, "F7.1"), "2 stages and 2 micro-batches", "F7.1 <--"),
    "no peer": (
        replace(GOOD, orders=(GOOD.orders[0], (Action(Kind.SEND_B, 0, 1),))),
        "SEND_B0.1: transfers, and only they, name a peer",
        "SEND_B0.1 <--",
    ),
    "swapped": (with_order(GOOD, 1, "B0.1 F0.1 F1.1 B1.1"), "B0.1 runs before F0.1, which it needs", "B0.1 <--"),
    "early recompute": (with_order(GOOD, 1, "R0.1 F0.1 B0.1 F1.1 B1.1"), "R0.1 runs before F0.1", "R0.1 <--"),
    "late recompute": (with_order(GOOD, 1, "F0.1 B0.1 R0.1 F1.1 B1.1"), "B0.1 runs before R0.1", "B0.1 <--"),
    "early weight": (with_order(GOOD, 1, "F0.1 W0.1 B0.1 F1.1 B1.1"), "W0.1 runs before B0.1", "W0.1 <--"),
    "deadlock": (
        schedule_of("F0.0 B0.0 F1.0 B1.0", "F0.1 F1.1 B0.1 B1.1", micro_batches=2, stage_rank=(0, 1)),
        "deadlock: rank 0 waits in B0.0 for B0.1 of rank 1; rank 1 waits in F1.1 for F1.0 of rank 0",
        "B0.0 <--",
    ),
    "missing receive": (
        with_order(SENT, 1, words(SENT)[1].replace("RECV_F1.1<0 ", "")),
        "RECV_F1.1<0 is missing: F1.1 uses a value that nobody receives",
        "F1.1 <--",
    ),
    "missing send": (
        with_order(SENT, 1, words(SENT)[1].replace("SEND_B0.1>0 ", "")),
        "SEND_B0.1>0 is missing: B0.1 makes a value that nobody sends",
        "B0.1 <--",
    ),
    "early send": (
        with_order(SENT, 0, words(SENT)[0].replace("F0.0 SEND_F0.0>1", "SEND_F0.0>1 F0.0")),
        "SEND_F0.0>1 runs before F0.0, which makes the value",
        "SEND_F0.0>1 <--",
    ),
    "late receive": (
        with_order(SENT, 1, words(SENT)[1].replace("RECV_F0.1<0 F0.1", "F0.1 RECV_F0.1<0")),
        "F0.1 uses a value before RECV_F0.1<0 receives it",
        "F0.1 <--",
    ),
    "not an edge": (
        add_transfers(gpipe(3, 1), chain(3) | {(0, 2)}),
        "RECV_B0.0<2 transfers a value that nobody uses: 0 -> 2 is no edge between two ranks",
        "RECV_B0.0<2 <--",
    ),
    "other channel order": (
        with_order(SENT, 0, "F0.0 F1.0 SEND_F1.0>1 SEND_F0.0>1 RECV_B0.0<1 RECV_B1.0<1 B0.0 B1.0"),
        "transfer 0 from rank 0 to rank 1 is sent as SEND_F1.0>1 but received as RECV_F0.1<0: a channel has no tags",
        "RECV_F0.1<0 <--",
    ),
}


@pytest.mark.parametrize(("broken", "reason", "mark"), REFUSED.values(), ids=REFUSED)
def test_a_broken_schedule_is_refused_and_shown(broken: Schedule, reason: str, mark: str) -> None:
    with pytest.raises(ValueError, match="rank 0 ") as refusal:
        validate(broken)
    said, *grid = str(refusal.value).splitlines()
    assert reason in said
    assert any(mark in line for line in grid)
    assert sum("<-- ERROR HERE" in line for line in grid) == 1


def test_a_long_schedule_is_shown_around_the_wrong_cell() -> None:
    long = one_f_one_b(2, 100)
    order = list(long.orders[1])
    order[100] = order[102]
    with pytest.raises(ValueError, match=r"F51\.1 is there twice") as refusal:
        validate(replace(long, orders=(long.orders[0], tuple(order))))
    grid = str(refusal.value).splitlines()[1:]
    assert grid[0] == "(from action 94 of each rank)"
    assert len(grid) == 3
    assert max(map(len, grid)) < 200


def test_an_edge_leads_to_a_later_stage() -> None:
    with pytest.raises(ValueError, match="edge 1 -> 0 must lead from a stage to a later one"):
        validate(GOOD, frozenset({(1, 0)}))


def test_transfers_are_added_once_and_never_late() -> None:
    with pytest.raises(ValueError, match="already has transfers"):
        add_transfers(SENT, chain(2))
    with pytest.raises(ValueError, match="cannot be posted after"):
        add_transfers(GOOD, chain(2), ahead=-1)
    with pytest.raises(ValueError, match=r"B1\.1 is missing"):
        add_transfers(with_order(GOOD, 1, "F0.1 B0.1 F1.1"), chain(2))


def test_a_schedule_needs_stages_and_micro_batches_and_a_rank_for_each() -> None:
    with pytest.raises(ValueError, match="at least one stage and one micro-batch: got 2 stages and 0 micro-batches"):
        gpipe(2, 0)
    with pytest.raises(ValueError, match="at least one stage"):
        one_f_one_b(0, 2)
    with pytest.raises(ValueError, match=r"stage_rank \(0, 2\) must give each of 2 stages one of the ranks 0 to 1"):
        replace(GOOD, stage_rank=(0, 2))


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    assert data_builder("1f1b") is one_f_one_b
    with pytest.raises(ValueError, match="unknown schedule 'gpip': did you mean 'gpipe'"):
        data_builder("gpip")
