"""What is said where no partition fits the memory, and that what is offered fits."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.graph import ProxyGraph
from tests.graphs import chain, encoder_decoder, gpt
from tests.test_planner import plan, schedules_strategy


def suggested(refused: BaseException) -> dict[str, dict[str, Any]]:
    """The changes offered, each under its own name: what has to be asked for together is one change."""
    offers: dict[str, dict[str, Any]] = {}
    for offer in str(refused).partition("What fits: ")[2].split("; or "):
        options = re.findall(r"\b(schedule|recompute|micro_batches|batch|pp|memory_limit)='?([\w-]+)", offer)
        offers[options[0][0]] = {name: int(value) if value.isdigit() else value for name, value in options}
    return offers


@settings(max_examples=25)
@given(
    st.sampled_from([gpt(3, d=8, s=16), encoder_decoder(2, d=8), chain([10**6] * 9, width=32, samples=8)]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    schedules_strategy,
    st.floats(0.05, 0.99),
    st.sampled_from(["auto", "none", "full"]),
)
def test_what_is_suggested_for_too_little_memory_fits(
    graph: ProxyGraph, pp: int, micro_batches: int, schedule: str, share: float, recompute: str
):
    options: dict[str, Any] = {
        "batch": 16, "micro_batches": micro_batches, "schedule": schedule, "recompute": recompute
    }  # fmt: skip
    roomy = plan(graph, pp, **options)
    limit = int(share * max(roomy.rank_bytes))
    try:
        tight = plan(graph, pp, memory_limit=limit, **options)
    except ValueError as refused:
        text, changes = str(refused), suggested(refused)
    else:
        assert max(tight.rank_bytes) <= limit
        return
    assert re.search(r"no way.* to cut", text)
    assert re.search(r"(stage|rank) \d needs [\d.]+ GB of [\d.]+ GB, [\d.]+ GB of it \w+", text)
    assert ("even with everything recomputed" in text) == (recompute == "auto")
    assert "memory_limit" in changes
    for change in changes.values():
        made = plan(graph, **{"pp": pp, "memory_limit": limit} | options | change)
        assert max(made.rank_bytes) <= made.memory_limit


@pytest.mark.parametrize(("share", "enough"), [(0.4, 3), (0.3, 4), (0.22, 6)])
def test_more_stages_are_offered_where_they_are_enough(share: float, enough: int):
    graph = gpt(8, d=64, s=4, samples=1)
    limit = int(share * plan(graph, 1, batch=1).rank_bytes[0])
    with pytest.raises(ValueError, match="no way to cut") as refused:
        plan(graph, 1, batch=1, memory_limit=limit)
    assert suggested(refused.value)["pp"]["pp"] == enough


def test_too_little_memory_names_what_dominates():
    graph = gpt(4, d=64, s=4, samples=1)
    with pytest.raises(ValueError, match=r"of it optimizer \(1 of 1 micro-batches alive, schedule 1f1b\)") as refused:
        plan(graph, 1, batch=1, memory_limit=2_500_000)
    assert set(suggested(refused.value)) == {"pp", "memory_limit"}, "a micro-batch cannot be smaller than one sample"
    with pytest.raises(ValueError, match="of it activations") as refused:
        plan(gpt(2, d=8, s=256, vocabulary=8), 1, batch=64, micro_batches=1, memory_limit=10**7)
    assert suggested(refused.value)["micro_batches"]["micro_batches"] > 1
