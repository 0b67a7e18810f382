"""A rank has its own weights and no others: from the model, its own initialisation, or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import Mesh, make_plan, trace
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.batches import rows
from merak_like.runtime.materialize import materialize
from tests.scenarios import PARTS

CPU = torch.device("cpu")


def plan_of(model: nn.Module, example: Any, loss_fn: Any, pp: int) -> tuple[Plan, Trace]:
    traced = trace(model, example, loss_fn)
    return make_plan(traced.graph, Mesh(pp=pp), hardware="a100-80gb", batch=rows(example) * PARTS), traced


class Tied(nn.Module):
    """Embedding and head are one, the first and the last stage hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(self.embed(ids))))


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch.flatten())


def test_rank_holds_its_own_weights_and_the_rest_is_on_meta() -> None:
    example = torch.randint(0, 12, (4, 5))
    plan, _ = plan_of(Tied(), example, cross_entropy, 3)
    for stage in range(3):
        torch.manual_seed(0)
        model = Tied()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        mine = materialize(model, plan, [stage], CPU, seed=0)
        assert mine.keys() == set(plan.stages[stage].params)
        assert all(torch.equal(p, before[name]) for name, p in mine.items())
        assert all(p.is_meta for name, p in model.named_parameters() if name not in mine)
        assert model.head.weight is model.embed.weight
        assert model.embed.weight.is_meta == (stage == 1)


class Secret(nn.Module):
    """A parameter that no method initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.gain).square().mean()


def test_weight_that_nothing_initialises_is_named() -> None:
    with torch.device("meta"):
        model = Secret()
    plan, _ = plan_of(model, torch.zeros(4, 8), lambda loss, batch: loss, 1)
    with pytest.raises(ValueError, match=r"nothing initialises \['gain'\] of Secret, .* pass weights="):
        materialize(model, plan, [0], CPU, seed=0)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plan, _ = plan_of(Tied(), torch.randint(0, 12, (4, 5)), cross_entropy, 2)
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(ValueError, match=r"no safetensors file and has none: give a checkpoint folder"):
        materialize(model, plan, [0], CPU, seed=0, weights=tmp_path)
    whole = {k: v.clone() for k, v in Tied().state_dict().items()}
    tied_elsewhere = {k: v for k, v in whole.items() if k != "embed.weight"}
    save_file(tied_elsewhere, tmp_path / "model.safetensors")
    mine = materialize(model, plan, [0], CPU, seed=0, weights=tmp_path)
    assert torch.equal(mine["embed.weight"], whole["head.weight"]), "a tie may be saved under its other name"
    for change, said in (
        ({"layers.0.weight": None}, r"has no \['layers.0.weight'\] \(1 missing\): is it the checkpoint of this model"),
        ({"layers.0.weight": torch.zeros(3, 3)}, r"layers.0.weight has shape \(8, 8\), in .* \(3, 3\)"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, tmp_path / "model.safetensors")
        with torch.device("meta"):
            model = Tied()
        with pytest.raises(ValueError, match=said):
            materialize(model, plan, [0], CPU, seed=0, weights=tmp_path)


def test_a_model_whose_other_stages_were_given_up_is_refused_rather_than_made_anew():
    model, ids = Tied(), torch.randint(0, 12, (2, 4))
    plan, _ = plan_of(model, ids, lambda out, batch: out.sum(), pp=2)
    materialize(model, plan, [0], CPU, seed=0)
    kept = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
    materialize(model, plan, [0], CPU, seed=0)  # its own stage is still there
    with pytest.raises(ValueError, match=r"an earlier engine gave .* build the model again, or save it"):
        materialize(model, plan, [1], CPU, seed=0)
    after = {name: p for name, p in model.named_parameters() if not p.is_meta}
    assert kept.keys() == after.keys()
    assert all(torch.equal(kept[name], after[name]) for name in kept)
