"""K-FAC by owners: what plain K-FAC does, without a factor on the wire."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from merak_like.runtime.methods.kfac import Kfac, owners_of
from merak_like.runtime.methods.method import Job, Methods
from tests.kfac_runs import WIDTHS, batches, by_engine, by_hooks, model, steps_to_target
from tests.ranks import Call, results_of, selected_calls
from tests.training import worst

OPTIONS: dict[str, Any] = {"damping": 0.003, "weight": 0.4}
"""The third step is the first whose share is not 1 / steps."""


AGAIN, LATER = {"micro_batches": 2, "recompute": "full"}, {"schedule": "zb-h1"}
MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in (("mlp", {}), ("images", LATER), ("mlp", LATER))]


@pytest.mark.parametrize(("kind", "more"), [("images", AGAIN), *MORE])
def test_one_rank_is_plain_kfac(kind: str, more: dict[str, Any]):
    data = batches(4, 64, torch.float64)
    theirs = by_hooks(model(kind, torch.float64), data, 0.1, **OPTIONS, clip=0.01)
    _, ours = by_engine(model(kind, torch.float64), data, 0.1, Kfac(**OPTIONS), **more)
    assert worst(ours, theirs)[0] < 1e-6


def test_a_step_that_is_not_finite_is_skipped_and_forgotten():
    data = batches(3, 32, torch.float64)
    spoiled = {**data[1], "x": data[1]["x"] * float("nan")}
    clean = by_engine(model(dtype=torch.float64), [data[0], data[2]], 0.1, Kfac())[1]
    losses, ours = by_engine(model(dtype=torch.float64), [data[0], spoiled, data[2]], 0.1, Kfac(), skip_not_finite=1)
    assert losses[1] != losses[1]
    assert worst(ours, clean)[0] < 1e-12


def test_owners_share_the_factors_evenly():
    sizes = {f"layer{i}": 10 for i in range(8)} | {"large": 40}
    owners = owners_of(sizes, 3)
    load = [sum(s for n, s in sizes.items() if owners[n] == rank) for rank in range(3)]
    assert sum(load) == 120
    assert max(load) == 40


def test_what_it_cannot_precondition_is_refused():
    with pytest.raises(ValueError, match="use zero=0"):
        Methods([Kfac()], Job("1f1b", 1, 1, 1))
    with pytest.raises(ValueError, match="precision= has them elsewhere: use zero=0 and float32"):
        Methods([Kfac()], Job("1f1b", 1, 1, 0, lowered=True))
    with pytest.raises(ValueError, match="damping is above 0"):
        Kfac(damping=0)


def run(name: str, dp: int, pp: int, kind: str, rate: float, steps: int, **more: Any) -> Call:
    return Call(
        name, "tests.kfac_runs:on_ranks", {"dp": dp, "pp": pp, "kind": kind, "rate": rate, "steps": steps, **more}
    )


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Any:
    return results_of(selected_calls(request))


TWO = {kind: run(f"two-{kind}", 2, 1, kind, 0.1, 4) for kind in ("sgd", "kfac", "mpd")}


def factors(weight: str) -> int:
    """Bytes of both factors of a layer in float32, its bias a column."""
    layer = {"0.weight": 0, "2.weight": 1, "4.weight": 2}[weight]
    return 4 * ((WIDTHS[layer] + 1) ** 2 + WIDTHS[layer + 1] ** 2)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("sgd", "kfac", "mpd"), [(TWO["sgd"], TWO["kfac"], TWO["mpd"])], ids=["2"])
def test_no_factor_is_on_the_wire_and_each_has_one_owner(sgd: Call, kfac: Call, mpd: Call, result: Any):
    plain, ours, shared = result(sgd), result(kfac), result(mpd)
    # beside the gradients and a few numbers: each preconditioned gradient once, and nothing else
    small = 64
    assert ours[0]["sent"]["all_reduce"] - plain[0]["sent"]["all_reduce"] <= small
    assert ours[0]["sent"]["broadcast"] == 4 * sum((a + 1) * b for a, b in pairwise(WIDTHS))
    extra = sum(factors(w) for w in ("0.weight", "2.weight", "4.weight"))
    assert 0 <= shared[0]["sent"]["all_reduce"] - plain[0]["sent"]["all_reduce"] - extra <= small
    names = [set(rank["owned"]) for rank in ours]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {"0.weight", "2.weight", "4.weight"}
    assert [rank["held"] for rank in ours] == [sum(map(factors, rank["owned"])) for rank in ours]


LOW = 0.02
"""A loss that takes SGD long."""
FOUR = {
    "mpd": [run(f"four-mpd-{r}", 4, 1, "mpd", r, 20, kl_clip=None) for r in (0.1, 0.2)],
    "kfac": [run(f"four-kfac-{r}", 4, 1, "kfac", r, 20, kl_clip=None) for r in (0.1, 0.2)],
    "sgd": [run(f"four-sgd-{r}", 4, 1, "sgd", r, 40) for r in (1.0, 2.0)],
}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", [c for calls in FOUR.values() for c in calls], ids=lambda c: c.name)
def test_four_replicas_train(call: Call, result: Any):
    losses = result(call)[0]["losses"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_steps_are_those_of_shared_factors_and_half_of_tuned_sgd(result: Any):
    """It took 3.5 times the steps of shared factors while the averages were of little but the last 32 rows."""
    best = {kind: min(steps_to_target(result(c)[0]["losses"], LOW) for c in calls) for kind, calls in FOUR.items()}
    assert best["kfac"] <= 1.1 * best["mpd"]
    assert best["kfac"] <= best["sgd"] / 2
    assert best["sgd"] <= 40


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "call",
    [run("pipeline", 1, 2, "kfac", 0.1, 6, kl_clip=None), run("tensor", 1, 1, "kfac", 0.1, 6, tp=2, kl_clip=None)],
    ids=lambda c: c.name,
)
def test_stages_and_shards_train(call: Call, result: Any):
    losses, _ = by_engine(model(), batches(6, 128), 0.1, Kfac(kl_clip=None))
    found = result(call)[0]["losses"]
    if call.name == "pipeline":
        assert found == pytest.approx(losses, rel=1e-4)
    else:  # factors of shards: another approximation
        assert found[-1] < losses[0] / 2
