"""Schedules as text: actions print and parse, torch's compute-only CSV is read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.schedules.action import RECEIVE_OF, USER_OF, Action, Kind, chain
from merak_like.partitioner.schedules.gpipe import gpipe
from merak_like.partitioner.schedules.grid import from_csv, picture, to_csv
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.validate import validate
from tests.schedule_cases import schedule_of


@given(kind=st.sampled_from(Kind), micro_batch=st.integers(0, 999), stage=st.integers(0, 99), peer=st.integers(0, 99))
def test_an_action_reads_back_as_it_prints(kind: Kind, micro_batch: int, stage: int, peer: int) -> None:
    transfer = kind in RECEIVE_OF or kind in USER_OF
    action = Action(kind, micro_batch, stage, peer if transfer else -1)
    assert Action.parse(str(action)) == action
    assert not transfer or action.match.match == action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2F0", "is no action: write KIND, micro-batch"),
        ("SND_F0.0>1", "unknown action kind 'SND_F': did you mean 'SEND_F'"),
        ("F0.0>1", "transfers, and only they, name a peer"),
        ("SEND_F0.0", "transfers, and only they, name a peer"),
        ("RECV_F0.0>1", "transfers, and only they, name a peer"),
    ],
)
def test_what_is_no_action_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Action.parse(text)


# Dumps of torch 2.13's own schedules, 2 ranks, 2 stages each, 4 micro-batches.
TORCH_INTERLEAVED = """\
0F0,0F1,2F0,2F1,,,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,,2B2,,2B3,,0B2,,0B3
,1F0,1F1,,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,,1B2,,1B3
"""
TORCH_INTERLEAVED_ZERO_BUBBLE = """\
0F0,0F1,2F0,,2F1,2I0,2W0,0F2,2I1,2W1,0F3,0I0,0W0,2F2,0I1,0W1,2F3,2I2,2W2,2I3,2W3,0I2,0W2,0I3,0W3
,1F0,1F1,3F0,3I0,3F1,3I1,3W0,1F2,1I0,3W1,1F3,1I1,1W0,3F2,3I2,1W1,3F3,3I3,3W2,1I2,3W3,1I3,1W2,1W3
"""
TORCH_ZERO_BUBBLE_V = """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0F3,0I0,0W0,3F2,3I2,3W2,0I1,0W1,3F3,3I3,3W3,0I2,0W2,0I3,0W3
,1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1F3,1I1,1W1,2F3,2I2,2W2,1I2,2I3,1I3,1W2,2W3,1W3
"""
TORCH_GPIPE = """\
0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3,0REDUCE_GRAD
1F0,1F1,1F2,1F3,1B0,1B1,1B2,1B3,1REDUCE_GRAD
"""


@pytest.mark.parametrize(
    ("text", "stage_rank"),
    [
        (TORCH_INTERLEAVED, (0, 1, 0, 1)),
        (TORCH_INTERLEAVED_ZERO_BUBBLE, (0, 1, 0, 1)),
        (TORCH_ZERO_BUBBLE_V, (0, 1, 1, 0)),
        (TORCH_GPIPE, (0, 1)),
    ],
    ids=["interleaved", "interleaved zero bubble", "zero bubble v", "gpipe"],
)
def test_torchs_schedules_are_read_and_carried_out(text: str, stage_rank: tuple[int, ...]) -> None:
    schedule = from_csv(text)
    assert (schedule.micro_batches, schedule.stage_rank) == (4, stage_rank)
    edges = chain(schedule.stages)
    assert validate(add_transfers(schedule, edges), edges) == validate(schedule)
    assert from_csv(to_csv(schedule)) == schedule
    cells = [[cell for cell in line.split(",") if cell and "REDUCE" not in cell] for line in text.splitlines()]
    assert [[cell for cell in line.split(",") if cell] for line in to_csv(schedule).splitlines()] == cells


def test_torchs_gpipe_is_ours() -> None:
    assert from_csv(TORCH_GPIPE) == gpipe(2, 4)


def test_torchs_cells_say_split_or_full_backward() -> None:
    half = schedule_of("F0.0 F1.0 B0.0 B1.0 W1.0", micro_batches=2, stage_rank=(0,))
    assert to_csv(half) == "0F0,0F1,0B0,0I1,0W1\n"
    assert to_csv(one_f_one_b(2, 2)) == "0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n"


def test_torchs_own_dump_of_1f1b_is_refused() -> None:
    """Torch 2.13 draws 1F1B for its visualizer with the last stage's forwards numbered from 1, not 0."""
    torch_dump = "0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F1,1B0,1F2,1B1,1F3,1B2,1F4,1B3\n"
    with pytest.raises(ValueError, match=r"F4\.0 is missing on rank 0"):
        validate(from_csv(torch_dump))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0F0,hello", "'hello' is no cell of torch's CSV"),
        ("0F0,0SEND_F0", "unknown kind in a compute-only CSV 'SEND_F'"),
        ("0F0,0B0\n0F1,0B1", "stage 0 is on rank 0 and again on rank 1"),
        ("0F0,0B0\n2F0,2B0", "stage 1 has no actions, but stage 2 has"),
        ("", "at least one stage"),
    ],
)
def test_csv_that_is_no_schedule_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_csv(text)


def test_torchs_csv_has_no_recompute() -> None:
    with pytest.raises(ValueError, match=r"no recompute, so R0\.0 cannot be written"):
        to_csv(schedule_of("F0.0 R0.0 B0.0", micro_batches=1, stage_rank=(0,)))


def test_a_deadlock_has_no_picture() -> None:
    with pytest.raises(ValueError, match=r"deadlock: rank 0 waits in B0\.0 for F0\.0 of rank 0"):
        picture(schedule_of("B0.0 F0.0", micro_batches=1, stage_rank=(0,)))
