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
    mesh = engine.plan.mesh
    engine.close()
    return {"losses": losses, "mesh": [mesh.dp, mesh.pp, mesh.tp]}


def test_one_process_has_one_layout():
    chosen, given = train(dp="auto", pp="auto", tp="auto"), train()
    assert chosen["mesh"] == [1, 1, 1]
    assert chosen["losses"] == pytest.approx(given["losses"], rel=1e-10)


def test_a_degree_is_a_number_or_auto():
    with pytest.raises(ValueError, match="a whole number, or 'auto'"):
        train(dp="all")


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_two_ranks_choose_the_same_and_train_as_one():
    asked = {"chosen": "auto", "tp": 2}
    calls = [
        Call(n, "tests.test_auto_degrees:train", {"dp": "auto", "pp": "auto", "tp": tp}) for n, tp in asked.items()
    ]
    job, alone = torchrun(calls, world=2), train()["losses"]
    for name in asked:
        for found in job.results(name):
            assert found["losses"] == pytest.approx(alone, rel=1e-10)
    assert job.results("tp")[0]["mesh"] == [1, 1, 2]
