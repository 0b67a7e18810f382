"""``auto_parallel`` with degrees left open: it chooses what the engine runs, and trains with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merak_like import auto_parallel
from tests.graphs import TOY
from tests.ranks import Call, torchrun
from tests.training import in_one_precision

SAMPLES = 8


def train(**degrees: Any) -> dict[str, Any]:
    """Two steps without dropout; the losses, and what was chosen."""
    one = in_one_precision("gpt2", dropout=False)
    batch = one.batch(SAMPLES)
    engine = auto_parallel(
        one.model, **degrees, example=batch, loss_fn=one.loss_fn, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
        hardware=TOY, timeout=100,
    )  # fmt: skip
    losses = [engine.step(batch).loss for _ in range(2)]
    plan = engine.plan
    engine.close()
    mesh = [plan.mesh.dp, plan.mesh.pp, plan.mesh.tp]
    return {"losses": losses, "mesh": mesh, "zero": plan.zero, "rows": plan.sequence_parallel}


def test_one_process_has_one_layout():
    chosen, given = train(dp="auto", pp="auto", tp="auto"), train()
    assert chosen["mesh"] == [1, 1, 1]
    assert chosen["losses"] == pytest.approx(given["losses"], rel=1e-10)


def test_a_degree_is_a_number_or_auto():
    with pytest.raises(ValueError, match="a whole number, or 'auto'"):
        train(dp="all")
    with pytest.raises(ValueError, match="no level of ZeRO: 0, 1, 2 or 3, or 'auto'"):
        train(zero="all")
    with pytest.raises(ValueError, match="True, False or 'auto'"):
        train(sequence_parallel="all")


def test_without_a_choice_the_level_and_the_form_are_plain():
    found = train(zero="auto", sequence_parallel="auto")
    assert (found["mesh"], found["zero"], found["rows"]) == ([1, 1, 1], 0, False)


def test_what_is_given_stays_with_spread_weights_too():
    assert train(dp="auto", pp="auto", zero=3)["mesh"] == [1, 1, 1]
    with pytest.raises(ValueError, match="pp = 2"):
        train(dp="auto", pp=2, zero=3)


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_two_ranks_choose_the_same_and_train_as_one():
    both = {"zero": "auto", "sequence_parallel": "auto"}
    asked: dict[str, dict[str, Any]] = {
        "chosen": {"tp": "auto"}, "tp": {"tp": 2}, "rows": {"tp": 2, **both}, "level": {"tp": 1, "pp": 1, **both},
    }  # fmt: skip
    calls = [
        Call(n, "tests.test_auto_degrees:train", {"dp": "auto", "pp": "auto", **some}) for n, some in asked.items()
    ]
    job, alone = torchrun(calls, world=2), train()["losses"]
    for name in asked:
        for found in job.results(name):
            assert found["losses"] == pytest.approx(alone, rel=1e-10)
    assert job.results("tp")[0]["mesh"] == [1, 1, 2]
    rows, level = job.results("rows")[0], job.results("level")[0]
    assert (rows["mesh"], rows["zero"], rows["rows"]) == ([1, 1, 2], 0, True)
    assert (level["mesh"], level["zero"], level["rows"]) == ([2, 1, 1], 1, False)
