"""Zero Bubble's measured profiles: throughput of four schedules, with one constant for what no profile has.

The steps were Megatron-LM's, whose transfers between stages stand between the passes: a rank waits until what it sent
and what it receives is through. So the profiles' transfer belongs to each pass, and nothing runs beside it; with
interleaved stages there are more passes, hence more of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from benchmarks.planner.rows import read
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.simulator import Costs, StageCosts, simulate

CHUNKS = {22: 3, 30: 4}
"""By layers, as the profiles count them: every virtual stage is of one layer, in the end two less."""


def _costs(row: Any, chunks: int) -> Costs:
    f, b, w = (row[f"{kind}_us"] / 1e6 / chunks for kind in ("TF", "TB", "TW"))
    sent = row["Tc_us"] / 1e6
    return Costs((StageCosts(f + sent, b + sent, weight=w),) * (row["p=GPUs"] * chunks))


def _steps(row: Any) -> dict[str, float]:
    ranks, m, chunks = row["p=GPUs"], row["m"], CHUNKS[row["L"]]
    alone = _costs(row, 1)
    return {
        "1f1b": simulate(one_f_one_b(ranks, m), alone).makespan,
        "1f1bI": simulate(interleaved(ranks, m, chunks), _costs(row, chunks)).makespan,
        "1p": auto(alone, m, live=(ranks,) * ranks).makespan,
        "2p": m * sum(row[f"{k}_us"] for k in ("TF", "TB", "TW", "Tc", "Tc")) / 1e6 / (1 - row["bub_2p"]),
    }


def rows() -> Iterator[tuple[str, bool, float, float]]:
    """Name, whether fitted, published and predicted samples per GPU and second.

    The constant is fitted to the rows of m = 32 micro-batches.
    """
    made: list[tuple[str, bool, float, float]] = []
    for row in read("zero_bubble_iclr24.csv"):
        samples, ranks = row["mbs"] * row["m"], row["p=GPUs"]
        for schedule, seconds in _steps(row).items():
            name = f"{row['model']} m={row['m']} {schedule}"
            made.append((name, row["m"] == 32, row[f"thr_{schedule}"], samples / ranks / seconds))
    extra = fmean(predicted / published for _, fitted, published, predicted in made if fitted)
    yield from ((name, fitted, published, predicted / extra) for name, fitted, published, predicted in made)
