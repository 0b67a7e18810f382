"""Activations spelled out by the model: which are recognised, and that the kernel computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from merak_like.partitioner.tracer import trace
from merak_like.partitioner.tracer.fine import fine_trace
from merak_like.partitioner.tracer.kernels import kernels
from merak_like.runtime.stage_code import build_stages


class Spelled(nn.Module):
    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), act, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))).sum()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "multiplied out": lambda x: x / 2 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh() * x / 2,
    "erf": lambda x: x.mul(torch.erf(x / math.sqrt(2))).add(x).mul(0.5),
    "swish": lambda x: torch.sigmoid(x).mul(x),
}


def in_place(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    x *= s
    return x


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "another constant": lambda x: 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.0447 * x**3))),
    "quick": lambda x: x * torch.sigmoid(1.702 * x),
    "clipped": lambda x: gelu(x).clip(-1, 1),
    "in another precision": lambda x: gelu(x.float()).to(x.dtype),
    "decided by data": lambda x: gelu(x) if x.sum() > 0 else x,
    "in place": in_place,
    "two inputs": lambda x: x * torch.sigmoid(x.flip(0)),
}


@pytest.mark.parametrize("formula", SAME.values(), ids=SAME)
def test_a_known_formula_becomes_a_kernel_with_its_values_and_gradients(formula: Callable[[Tensor], Tensor]):
    kernel = kernels(nn.Sequential(Spelled(formula)))["0"]
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
    theirs, ours = formula(x), kernel(x)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-14)
    seed = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    (gradient,), (same) = torch.autograd.grad(theirs, x, seed), torch.autograd.grad(ours, x, seed)[0]
    assert torch.allclose(gradient, same, rtol=0, atol=1e-14)


@pytest.mark.parametrize("formula", OTHER.values(), ids=OTHER)
def test_what_is_not_the_textbooks_formula_stays(formula: Callable[[Tensor], Tensor]):
    assert not kernels(nn.Sequential(Spelled(formula)))


def test_of_transformers_activations_all_and_only_the_spelled_out_ones_are_recognised():
    found: dict[str, float] = {}
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    for name in ACT2FN:
        if name == "xielu":
            continue  # has parameters, and warns of a package
        module = nn.Sequential(ACT2FN[name])
        if (kernel := kernels(module).get("0")) is not None:
            found[name] = float((kernel(x) - module(x)).abs().max())
    assert found.keys() == {"gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_accurate"}
    assert max(found.values()) < 1e-10


def test_a_module_is_looked_at_and_left_alone():
    counting = Counting()
    assert not kernels(nn.Sequential(counting)), "a kernel would not count"
    assert counting.calls == 0
    hooked = nn.Sequential(Spelled(gelu))
    hooked[0].register_forward_hook(lambda *_: None)
    assert not kernels(hooked)


def _targets(model: nn.Module, **options: Any) -> set[str]:
    return {op.target for op in trace(model, torch.randn(2, 4), lambda out, _: out, **options).graph.ops}


def test_a_trace_has_the_kernel_unless_told_otherwise():
    model = Block(Spelled(gelu))
    assert "torch._C._nn.gelu" in _targets(model)
    assert "act" in _targets(model, fuse=False)
    fine = fine_trace(model, torch.randn(2, 4), lambda out, _: out)
    assert "tanh" not in {op.target for op in fine.graph.ops}
    hooked = Block(Spelled(gelu))
    hooked.register_full_backward_hook(lambda *_: None)
    assert "torch._C._nn.gelu" not in _targets(hooked), "the block's own call must stay, or its hook is lost"


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_around_an_activation_run_at_every_call(register: str):
    model, calls = nn.Sequential(Block(Spelled(gelu))), list[str]()
    getattr(model[0], register)(lambda *_: calls.append("called"))
    x = torch.randn(2, 4)
    traced = trace(model, x, lambda out, _: out)
    (code,) = build_stages(traced, model, [0, len(traced.graph.ops)])
    calls.clear()
    code.pieces[0].module(x)
    assert calls == ["called"]


def test_stages_with_kernels_give_the_models_numbers_and_save_less():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=32, use_cache=False)
    model = GPT2LMHeadModel(config).double().train(False)
    ids = torch.randint(0, 32, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    plain, fused = trace(model, batch, fuse=False), trace(model, batch)
    assert len(plain.graph.ops) == len(fused.graph.ops), "a plan cuts both at the same places"
    (code,) = build_stages(fused, model, [0, len(fused.graph.ops)])
    (piece,) = code.pieces
    found = dict(zip(piece.made, piece.module(*(batch[name] for name in piece.inputs)), strict=True))
    expected = model(**batch).loss
    parameters = list(model.parameters())
    theirs, ours = (torch.autograd.grad(loss, parameters) for loss in (expected, found["loss"]))
    assert abs(float((found["loss"] - expected).detach())) < 1e-14
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(theirs, ours, strict=True))
    saved = [sum(op.saved_bytes for op in one.graph.ops) for one in (plain, fused)]
    activation = 2 * 8 * 64 * 8  # one tensor between the two products of a feed-forward, float64
    assert saved[0] - saved[1] >= 2 * 2 * activation
