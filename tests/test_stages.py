"""A plan on the traces of other batches: where the stages begin, what they run, what is sent, what is kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import Mesh, make_plan, trace
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.realign import realign
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.batches import rows
from merak_like.runtime.orders import Orders
from merak_like.runtime.programs import Programs
from merak_like.runtime.stage_code import build_stage, foldable
from merak_like.runtime.tensor_parallel.sharding import sharding
from tests.faults import Small, items, mean_square
from tests.scenarios import PARTS, Patchy, patchy
from tests.training import subject

CPU = torch.device("cpu")


def plan_of(model: nn.Module, example: Any, loss_fn: Any, pp: int) -> tuple[Plan, Trace]:
    traced = trace(model, example, loss_fn)
    return make_plan(traced.graph, Mesh(pp=pp), hardware="a100-80gb", batch=rows(example) * PARTS), traced


def test_plan_fits_the_trace_of_a_longer_batch_at_the_same_places() -> None:
    one = patchy()
    plan, planned = plan_of(one.model, one.batch(2, 6), one.loss_fn, 3)
    other = trace(one.model, one.batch(3, 9), one.loss_fn)
    assert realign(plan, planned.graph, other.graph) == plan.starts


def test_plan_follows_its_weights_where_another_batch_runs_other_ops() -> None:
    one = subject("gpt2")
    plan, planned = plan_of(one.model, one.batch(2), None, 4)
    other = trace(one.model, one.batch(1), None)  # one sample: no pads, so that no mask is made
    assert len(other.graph.ops) < len(planned.graph.ops)
    starts = realign(plan, planned.graph, other.graph)
    assert starts != plan.starts
    for stage, (first, stop) in zip(plan.stages, pairwise(starts), strict=True):
        used = {other.graph.canonical[name] for op in other.graph.ops[first:stop] for name in op.params}
        assert used <= {*stage.params}, f"stage {stage.index}"


class Either(nn.Module):
    """The layers run in another order when the batch is long."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if len(x) < 5 else reversed(self.layers):
            x = torch.tanh(layer(x))
        return x.square().mean()


def test_plan_is_refused_where_another_batch_needs_the_weights_elsewhere() -> None:
    def own(loss: Tensor, batch: Any) -> Tensor:
        return loss

    plan, planned = plan_of(Either(), torch.randn(2, 4), own, 3)
    with pytest.raises(ValueError, match=r"with these input shapes stage 0 would need \['layers.*make the plan with"):
        realign(plan, planned.graph, trace(Either(), torch.randn(6, 4), own).graph)


def test_orders_send_what_this_step_needs_and_nothing_else() -> None:
    """A mask made on stage 0 and read on stage 2 travels in one step and is not there in the next."""
    one = patchy()
    plan, _ = plan_of(one.model, one.batch(2), one.loss_fn, 3)
    chain, skip = frozenset({(0, 1), (1, 2)}), frozenset({(0, 1), (1, 2), (0, 2)})
    for stage, peers in ((0, {2}), (1, set()), (2, {0})):
        orders = Orders(plan, stage)
        plain, more = orders.at(chain, training=True), orders.at(skip, training=True)
        assert orders.at(chain, training=True) is plain
        extra = {action.peer for action in set(more.order) - set(plain.order)}
        assert extra == peers
        assert more.last == {[action for action in more.order if action.kind is Kind.B][-1]}
        assert {a for waited in more.waits.values() for a in waited} == {
            a for a in more.order if a.kind in (Kind.RECV_F, Kind.RECV_B)
        }
        forward = orders.at(skip, training=False)
        assert not forward.last
        assert {action.kind for action in forward.order} <= {Kind.F, Kind.SEND_F, Kind.RECV_F}
    assert len(Orders(plan, 2).at(skip, training=True).waits[Action(Kind.F, 0, 2)]) == 2


def test_programs_keep_a_trace_for_each_shape_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 6
    monkeypatch.setattr("merak_like.runtime.programs.KEPT", kept)
    model = Small(2).double().train()
    plan, planned = plan_of(model, items(2), mean_square, 1)
    whole = sharding(model, 1, mean_square)
    programs = Programs(model, plan, planned, items(2), 0, CPU, whole, whole.prepare(None, None))  # type: ignore[arg-type]
    first = programs.at(items(2))
    assert first.traced is planned, "the planning trace is used again"
    assert programs.at(items(2, seed=5)) is first
    second = programs.at(items(3))
    assert second is not first
    with torch.autocast("cpu", torch.bfloat16):
        assert programs.at(items(2)) is not first
    model.eval()
    assert programs.at(items(2)) is not first
    model.train()
    assert programs.at(items(2)) is first
    for size in range(4, kept + 1):
        programs.at(items(size))
    assert programs.at(items(2)) is first
    assert programs.at(items(3)) is not second, "the one used longest ago was forgotten"
    assert sum(map(len, programs._known.values())) == kept


def test_calls_inside_a_stage_stay_calls_of_the_users_modules() -> None:
    one = subject("llama")
    plan, traced = plan_of(one.model, one.batch(2), None, 2)
    folded = [call.path for call in foldable(traced, plan.starts)]
    blocks = {f"model.layers.{i}" for i in range(4)}
    cut = [path for path in folded if path in blocks]
    assert len(cut) >= 3, f"at most one block is cut in two: {folded}"
    assert not any(a != b and b.startswith(a + ".") for a in folded for b in folded), "a call inside a folded call"
    found: list[str] = []
    for index in range(2):
        code = build_stage(traced, one.model, plan.starts, index)
        (piece,) = code.pieces
        called = [str(node.target) for node in piece.module.graph.nodes if node.op == "call_module"]
        assert all(piece.module.get_submodule(path) is one.model.get_submodule(path) for path in called)
        found += called
    assert set(folded) <= set(found)


def test_patchy_is_what_the_scenarios_say() -> None:
    model = Patchy().double()
    nn.functional.cross_entropy(
        model(torch.zeros(2, 3, dtype=torch.long)).flatten(0, 1), torch.zeros(6).long()
    ).backward()
    none = {name for name, p in model.named_parameters() if p.grad is None}
    assert none == {f"{m}.{p}" for m in ("aside", "never", "layers.1", "layers.6") for p in ("weight", "bias")}
