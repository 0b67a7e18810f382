"""Schedules as text: a picture over time, program orders with one cell marked, and torch's compute-only CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merak_like.partitioner.schedules.action import COMPUTE, Action, Edges, Kind, Schedule, chain, unknown
from merak_like.partitioner.schedules.clock import deadlock, run_unit_clock

_MARK = "<-- ERROR HERE"
_AROUND = 8  # cells shown on either side of a marked one

_CELL = re.compile(r"(\d+)([A-Z_]+?)(\d*)")
#: torch's words: I is a backward for inputs only, B a full one. REDUCE_GRAD ends its dumps and is no part of an order.
_FROM_TORCH = {"F": Kind.F, "I": Kind.B, "B": Kind.B, "W": Kind.W}
_NOT_COMPUTE = "REDUCE_GRAD"


def ticks(schedule: Schedule, edges: Edges | None = None) -> list[list[Action | None]]:
    """Return, per rank, what is computed at each tick when every computation takes one; None is a bubble."""
    clock = run_unit_clock(schedule, chain(schedule.stages) if edges is None else edges)
    if clock.waits:
        raise ValueError(deadlock(schedule, clock.waits)[1])
    rows: list[list[Action | None]] = []
    for order, starts in zip(schedule.orders, clock.starts, strict=True):
        row: list[Action | None] = []
        for action, start in zip(order, starts, strict=True):
            if action.kind in COMPUTE:
                row += [None] * (round(start) - len(row))
                row.append(action)
        rows.append(row)
    return rows


def picture(schedule: Schedule, edges: Edges | None = None) -> str:
    """Draw the computations over time, one column per tick, '..' for a bubble; transfers are left out.

    stage 0  F0 F1 .. B0 F2 B1 .. B2
    stage 1  .. F0 B0 F1 B1 F2 B2
    """
    stage_per_rank = schedule.stage_rank == tuple(range(schedule.ranks))

    def cell(action: Action | None) -> str:
        if action is None:
            return ".."
        return f"{action.kind.value}{action.micro_batch}" if stage_per_rank else str(action)

    rows = [[cell(action) for action in row] for row in ticks(schedule, edges)]
    return _align(rows, "stage" if stage_per_rank else "rank")


def marked(schedule: Schedule, rank: int, at: int) -> str:
    """Show every rank's order around cell number `at` of one rank, in program order, and mark that cell."""
    first, last = max(0, at - _AROUND), at + _AROUND + 1
    cells = [[str(action) for action in order[first:last]] for order in schedule.orders]
    if at < len(schedule.orders[rank]):
        cells[rank][at - first] += f" {_MARK}"
    else:
        cells[rank].append(_MARK)
    title = [] if first == 0 else [f"(from action {first} of each rank)"]
    return "\n".join([*title, _align(cells, "rank")])


def _align(rows: Sequence[Sequence[str]], name: str) -> str:
    columns = max((len(row) for row in rows), default=0)
    width = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    digits = len(str(len(rows) - 1))
    lines = (" ".join(cell.ljust(width[column]) for column, cell in enumerate(row)) for row in rows)
    return "\n".join(f"{name} {number:>{digits}}  {line}".rstrip() for number, line in enumerate(lines))


def to_csv(schedule: Schedule, edges: Edges | None = None) -> str:
    """Write torch's compute-only format: one row per rank, a column per tick, 2F0 = stage 2, forward, micro-batch 0."""
    put_off = {(a.micro_batch, a.stage) for order in schedule.orders for a in order if a.kind is Kind.W}

    def cell(action: Action | None) -> str:
        if action is None:
            return ""
        if action.kind is Kind.R:
            raise ValueError(f"torch's CSV has no recompute, so {action} cannot be written: drop the recompute pass")
        split = action.kind is Kind.B and (action.micro_batch, action.stage) in put_off
        return f"{action.stage}{'I' if split else action.kind.value}{action.micro_batch}"

    return "".join(",".join(cell(action) for action in row) + "\n" for row in ticks(schedule, edges))


def from_csv(text: str) -> Schedule:
    """Read torch's compute-only format; a blank cell is a bubble, the row of a stage is its rank."""
    orders: list[tuple[Action, ...]] = []
    stage_rank: dict[int, int] = {}
    for rank, line in enumerate(text.strip("\n").splitlines()):
        cells = [cell.strip() for cell in line.split(",")]
        order = tuple(_read(cell) for cell in cells if cell and not cell.endswith(_NOT_COMPUTE))
        for action in order:
            if stage_rank.setdefault(action.stage, rank) != rank:
                raise ValueError(f"stage {action.stage} is on rank {stage_rank[action.stage]} and again on rank {rank}")
        orders.append(order)
    stages = 1 + max(stage_rank, default=-1)
    absent = sorted(set(range(stages)) - set(stage_rank))
    if absent:
        raise ValueError(f"stage {absent[0]} has no actions, but stage {stages - 1} has")
    micro_batches = 1 + max((action.micro_batch for order in orders for action in order), default=-1)
    return Schedule(stages, micro_batches, tuple(orders), tuple(stage_rank[stage] for stage in range(stages)))


def _read(cell: str) -> Action:
    match = _CELL.fullmatch(cell)
    if match is None or not match[3]:
        raise ValueError(f"{cell!r} is no cell of torch's CSV: write stage, kind, micro-batch, as in 2F0")
    if match[2] not in _FROM_TORCH:
        raise unknown("kind in a compute-only CSV", match[2], _FROM_TORCH)
    return Action(_FROM_TORCH[match[2]], int(match[3]), int(match[1]))
