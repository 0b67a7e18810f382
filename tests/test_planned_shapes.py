"""A plan cuts the ops of one input shape: it is made for the micro-batches it chooses, and refused for others."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Mesh, auto_parallel, make_plan, trace


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def batch(samples: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(samples * 16).view(samples, 16) % 97
    return {"input_ids": ids, "labels": ids.clone()}


def test_one_sample_of_gpt2_runs_fewer_ops_than_two() -> None:
    """What makes these tests tests: one row cut out of a batch is already contiguous."""
    assert len(trace(gpt2(), batch(1)).graph.ops) < len(trace(gpt2(), batch(2)).graph.ops)


def test_plan_is_made_again_for_the_micro_batches_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was traced with the whole batch, cut for that, and the engine ended with an IndexError."""

    def one_sample_each(graph: object, mesh: Mesh, *, micro_batches: int | None, **rest: object) -> object:
        return make_plan(graph, mesh, micro_batches=micro_batches or 4, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("merak_like.deciding.make_plan", one_sample_each)
    model = gpt2()
    engine = auto_parallel(model, example=batch(4), hardware="a100-80gb", device="cpu")
    assert engine.plan.starts == (0, len(trace(model, batch(1)).graph.ops))
    assert engine.step(batch(4)).loss > 0
    engine.close()


def test_plan_of_another_shape_is_refused() -> None:
    plan = make_plan(trace(gpt2(), batch(2)).graph, Mesh(), hardware="a100-80gb", batch=2, micro_batches=1)
    with pytest.raises(ValueError, match=r"runs \d+ for micro-batches of 1 samples: make the plan from this model"):
        auto_parallel(gpt2(), example=batch(1), plan=plan, device="cpu")


def test_plan_of_an_example_with_one_tensor_twice_is_obeyed() -> None:
    """One object for ids and labels was one input to the trace and two to the engine, which refused the plan."""
    ids = batch(2)["input_ids"]
    shared = {"input_ids": ids, "labels": ids}
    graph = trace(gpt2(), shared).graph
    assert len(graph.ops) == len(trace(gpt2(), batch(2)).graph.ops)
    plan = make_plan(graph, Mesh(), hardware="a100-80gb", batch=2, micro_batches=1)
    engine = auto_parallel(gpt2(), example=shared, plan=plan, device="cpu")
    assert engine.step(batch(2)).loss > 0
    engine.close()
