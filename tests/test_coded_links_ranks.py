"""Codecs between stages in real processes, against one process with the same codec at the same cuts, to 1e-10.

Losses, norms, every gradient and the weights; micro-batches of two sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import Call, results_of, selected_calls

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]


def call(function: str, *layout: int, module: str = "coded", **more: Any) -> Call:
    axes = dict(zip(("dp", "pp", "tp"), layout, strict=False))
    words = [function, *map(str, more.values()), "x".join(map(str, layout))]
    return Call("-".join(words), f"tests.{module}:{function}", {**axes, **more})


def cells(*calls: Call, slow: bool = False) -> list[Any]:
    return [pytest.param(one, id=one.name, marks=(pytest.mark.slow,) if slow else ()) for one in calls]


COARSE = cells(
    call("coded", 1, 2, text="int(4, stochastic=True)|bf16", schedule="interleaved", chunks=2),
    call("coded", 1, 2, text="topk(0.5)+int8", schedule="zb-h1"),
) + cells(
    call("coded", 1, 2, text="int8"),
    call("coded", 1, 2, text="sign|fp16", schedule="zb-v"),
    call("coded", 1, 2, text="c3sl(2)|randtopk(0.5, 0.2)", schedule="gpipe", recompute="full"),
    call("coded", 1, 4, text="int4|int8"),
    call("coded", 2, 2, text="int(4, stochastic=True)|topk(0.3)"),
    call("coded", 1, 2, 2, text="int8|int6"),
    slow=True,
)  # fmt: skip
REMEMBERED = cells(
    call("remembered", 1, 2, text="aqsgd(3)|int8", schedule="interleaved", chunks=2, epochs=2)
) + cells(
    call("remembered", 1, 2, text="aqsgd(4)"),
    call("remembered", 1, 2, text="aqsgd(2)|bf16", schedule="zb-h1"),
    call("remembered", 1, 2, text=f"aqsgd(4, capacity={12 * 3 * 16 * 8})"),  # half of the samples
    call("remembered", 2, 2, text="aqsgd(4)|int8"),
    call("remembered", 1, 4, text="aqsgd(4)|aqsgd(4)"),
    call("remembered", 1, 2, 2, text="aqsgd(4)|int8"),
    slow=True,
)  # fmt: skip
# In a step each of 8 micro-batches of 2 samples of 3 positions goes there and its gradient back, 16 channels each.
BYTES = cells(
    call("bytes_sent", 1, 2, text="int8", each=[6 * 16 + 16 * 2] * 2),  # a byte an element, a bf16 scale a channel
    call("bytes_sent", 1, 2, text="int4|fp16", each=[6 * 16 // 2 + 16 * 2, 6 * 16 * 2]),
)
# Forward 2 samples take, at their first visit, 2 x 48 numbers of 8 bytes, later half a byte for each; 16 scales of 2
# bytes; 11 bytes of flags and checksums; and 20 that say how both parts lie.
VISITS = cells(
    call(
        "visits_sent", 1, 2, text="aqsgd(4)|int8",
        each=[[96 * 8 + 32 + 11 + 20, 96 + 32], *[[96 // 2 + 32 + 11 + 20, 96 + 32]] * 2],
    )
)  # fmt: skip
ALIKE = cells(
    call("as_without", 1, 2, name="unet", schedule="1f1b"),
    call("as_without", 1, 2, name="t5", schedule="interleaved"),
    call("as_without", 1, 2, name="gpt2", schedule="zb-h1"),
    call("as_without", 1, 2, 2, name="gpt2", sequence_parallel=True),
    slow=True,
)
GONE_ON = cells(call("went_on", 1, 2, module="coded_runs", text="aqsgd(4)|int8", background=True)) + cells(
    call("went_on", 2, 2, module="coded_runs", text="aqsgd(4)", background=False),
    call("went_on", 1, 2, 2, module="coded_runs", text="aqsgd(4)|bf16", background=False),
    slow=True,
)
RUNS = cells(
    *(
        call(function, 1, 2, module="coded_runs", text=text)
        for function in ("by_trainer", "by_hf_trainer", "from_a_file")
        for text in ("int8", "aqsgd(4)|int8")
    ),
    call("by_trainer", 2, 2, module="coded_runs", text="aqsgd(4)"),
    slow=True,
)
LEARNING = cells(*(call(function, 1, 2, module="coded_runs") for function in ("learns", "left_out")), slow=True)
REAL = cells(call("real", 1, 2, name="gpt2", codec="int8|int4"), slow=True)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank."""
    return results_of(selected_calls(request), timeout=500.0)


@pytest.mark.parametrize("case", COARSE)
def test_trains_as_one_process_with_the_codec_at_the_cuts(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", BYTES)
def test_what_travels_is_codes_and_scales(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert results(case)


@pytest.mark.parametrize("case", REMEMBERED)
def test_trains_as_one_process_that_remembers_the_same(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", VISITS)
def test_first_visits_are_whole_and_later_ones_are_changes(case: Call, results: Callable[[Call], list[Any]]) -> None:
    results(case)


@pytest.mark.parametrize("case", ALIKE)
def test_identity_is_no_codec_bit_for_bit(case: Call, results: Callable[[Call], list[Any]]) -> None:
    results(case)


@pytest.mark.parametrize("case", REAL)
def test_a_transformer_learns_and_writes(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert len(set(results(case))) == 1


@pytest.mark.parametrize("case", GONE_ON)
def test_a_job_goes_on_with_what_it_remembered(case: Call, results: Callable[[Call], list[Any]]) -> None:
    results(case)


@pytest.mark.parametrize("case", LEARNING)
def test_changes_cost_less_than_values_and_no_sick_one_stays(case: Call, results: Callable[[Call], list[Any]]) -> None:
    results(case)


@pytest.mark.parametrize("case", RUNS)
def test_trainers_train_through_it(case: Call, results: Callable[[Call], list[Any]]) -> None:
    first, *others = results(case)
    assert all(other == first for other in others)
