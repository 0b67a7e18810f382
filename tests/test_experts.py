"""Experts that share a core: exact chains, few parameters, and training that does not depend on the layout."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import auto_parallel, trace
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.tensor_parallel import derive
from merak_like.partitioner.tensor_parallel.prove import prove
from merak_like.partitioner.tracer.fine import fine_trace, steps
from merak_like.runtime.batches import rows
from merak_like.runtime.local import LocalPipeline
from merak_like.runtime.methods.experts import CentralMask, MatrixProductExperts, SharedCore, bonds, contract, decompose
from merak_like.runtime.tensor_parallel.blueprint import on_meta
from tests.ranks import Call, results_of, selected_calls
from tests.training import Subject, by_engine, plainly, same

ROWS, COLUMNS = (2, 2, 4, 2, 2), (2, 4, 4, 4, 2)


def test_full_bonds_are_exact():
    torch.manual_seed(0)
    matrix = torch.randn(prod(ROWS), prod(COLUMNS), dtype=torch.float64)
    cores = decompose(matrix, ROWS, COLUMNS)
    assert (contract([core.unsqueeze(0) for core in cores])[0] - matrix).abs().max() < 1e-12
    truncated = decompose(matrix, ROWS, COLUMNS, 8)
    assert sum(c.numel() for c in truncated) < sum(c.numel() for c in cores)


def test_parameters_are_one_middle_core_and_the_rest_for_each():
    sizes = [a * i * j * b for i, j, (a, b) in zip(ROWS, COLUMNS, pairwise(bonds(ROWS, COLUMNS)), strict=True)]
    formula = sizes[2] + 8 * (sum(sizes) - sizes[2])
    shared = SharedCore(8, ROWS, COLUMNS)
    assert sum(p.numel() for p in shared.parameters()) == formula == 33024  # 8 whole matrices: 131,072
    assert shared().shape == (8, prod(ROWS), prod(COLUMNS))


def test_only_the_best_experts_count():
    torch.manual_seed(0)
    layer, x = MatrixProductExperts(4, (2, 2, 2), (2, 2, 4), top=2).double(), torch.randn(5, 8, dtype=torch.float64)
    best = layer.gate(x).topk(2, -1)
    up, down, share = layer.up(), layer.down(), best.values.softmax(-1)
    for row in range(5):
        ways = [F.gelu(x[row] @ up[e]) @ down[e] for e in best.indices[row]]
        assert torch.allclose(layer(x)[row], torch.stack([s * w for s, w in zip(share[row], ways, strict=True)]).sum(0))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="make 4 x 4"):
        decompose(torch.zeros(4, 5), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="odd number"):
        SharedCore(2, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="use 1 to 2"):
        MatrixProductExperts(2, (2, 2, 2), (2, 2, 2), top=3)


class Model(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(MatrixProductExperts(experts, (2, 2, 2), (2, 2, 4)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def batch(size: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(20, (size, 9), generator=torch.Generator().manual_seed(size))}


def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(Model().double(), batch, None, rows)


def trained(dp: int, pp: int, tp: int) -> Any:
    """By the engine on a layout and plainly, compared on rank 0."""
    one = subject()
    ours = by_engine(one, [batch(8), batch(8)], dp, pp, 2, tp=tp)
    if ours.weights:
        same(ours, plainly(Subject(one.model, batch, lambda out, _: out, rows), [batch(8), batch(8)], 2 * dp), 1e-10)
    return True


def test_a_cut_between_blocks_computes_the_same():
    model = subject().model
    traced = trace(model, batch(4))
    loss = model(**batch(4))
    loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    places = find_cuts(traced.graph).positions.tolist()
    found = LocalPipeline(traced, model, (0, places[len(places) // 2], len(traced.graph.ops))).step(batch(4))
    assert torch.equal(found["loss"], loss.detach())
    assert all(p.grad is not None and torch.equal(p.grad, whole[n]) for n, p in model.named_parameters())


def test_chains_are_divided_over_tensor_parallel_ranks_and_proven():
    model = on_meta(subject().model)
    fine = fine_trace(model, batch(4), None, device="cpu")
    found = derive(fine.graph, steps(fine), 2, constants=fine.constants)
    proven = prove(model, fine, found, batch(4))
    assert not proven.failed
    assert proven.derived.share > 0.9  # along the bonds of the chains, not by expert
    assert proven.worst < 1e-12


LAYOUTS = [Call(f"{d}x{p}x{t}", "tests.test_experts:trained", {"dp": d, "pp": p, "tp": t})
           for d, p, t in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]  # fmt: skip


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Any:
    return results_of(selected_calls(request))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", LAYOUTS, ids=lambda c: c.name)
def test_every_layout_trains_as_one_process(call: Call, result: Any):
    assert result(call) == [True, True]


def test_the_middle_core_rests_in_some_steps_and_only_it():
    one = subject()
    engine = auto_parallel(
        one.model, example=batch(4), hardware="a100-80gb", device="cpu", methods=[CentralMask(0.5, seed=1)],
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )  # fmt: skip
    moved: list[bool] = []
    for _ in range(8):
        before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
        engine.step(batch(4))
        still = {n for n, p in one.model.named_parameters() if torch.equal(p, before[n])}
        assert still in (set(), {f"blocks.{b}.{side}.central" for b in (0, 1) for side in ("up", "down")})
        moved.append(not still)
    engine.close()
    assert {True, False} == set(moved)
