"""The numbers on a traced op: flops by formula, bytes kept for the backward as autograd keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merak_like._compat import storage_key
from merak_like.partitioner import tracer
from merak_like.partitioner.tracer import trace
from merak_like.partitioner.tracer.calls import Choices
from tests.zoo.hugging_face import CASES
from tests.zoo.plain import TOYS

B, L, D = 2, 6, 8


def mean(outputs: Any, batch: Any) -> Tensor:
    return outputs.float().mean()


class Calling(nn.Module):
    """Calls one function on the example's tensors, all of which want a gradient."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*(t * self.scale for t in tensors))


# --------------------------------------------------------------------------------------------------------------- flops
def test_flops_of_modules() -> None:
    def of(module: nn.Module, *shape: int) -> int:
        return trace(nn.Sequential(module), torch.zeros(shape), mean).graph.ops[1].flops

    assert of(nn.Linear(D, 3 * D), B, L, D) == 2 * B * L * D * 3 * D
    assert of(nn.Conv2d(4, 8, 3, padding=1, groups=2), B, 4, 5, 5) == 2 * B * 8 * 5 * 5 * (4 // 2) * 3 * 3
    assert of(nn.ConvTranspose2d(4, 8, 2, stride=2), B, 4, 5, 5) == 2 * B * 4 * 5 * 5 * 8 * 2 * 2
    assert of(nn.GELU(), B, L, D) == B * L * D


@pytest.mark.parametrize(
    ("function", "name", "shapes", "flops"),
    [
        (torch.matmul, "matmul", ((B, L, D), (D, 5)), 2 * B * L * D * 5),
        (lambda a, b: a @ b, "matmul", ((B, L, D), (D, 5)), 2 * B * L * D * 5),
        (torch.bmm, "bmm", ((B, L, D), (B, D, 5)), 2 * B * L * D * 5),
        (torch.addmm, "addmm", ((5,), (L, D), (D, 5)), 2 * L * D * 5),
        (lambda a, b: torch.einsum("bld,ed->ble", a, b), "einsum", ((B, L, D), (5, D)), 2 * B * L * D * 5),
        (F.linear, "linear", ((B, L, D), (5, D)), 2 * B * L * D * 5),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention", ((B, 4, L, D),) * 3, 4 * B * 4 * L * L * D),
        (torch.add, "add", ((B, L), (B, L)), B * L),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_flops_of_functions(
    function: Callable[..., Tensor], name: str, shapes: tuple[tuple[int, ...], ...], flops: int
) -> None:
    batch = tuple(torch.zeros(shape) for shape in shapes)
    graph = trace(Calling(function), (*batch, torch.zeros(1)), lambda out, b: out.mean()).graph
    assert [op.flops for op in graph.ops if op.target.split(".")[-1] == name] == [flops]


def test_a_view_costs_nothing_and_an_embedding_reads_its_rows() -> None:
    graph = trace(Calling(lambda x: x.view(-1)[2:].unsqueeze(0)), (torch.zeros(B, L),), mean).graph
    views = [op for op in graph.ops if op.target in ("view", "__getitem__", "unsqueeze")]
    assert len(views) == 3
    assert all(op.flops == op.moved_bytes == op.kernels == op.saved_bytes == 0 for op in views)
    rows = trace(nn.Sequential(nn.Embedding(1000, D)), torch.zeros(B, L, dtype=torch.long), mean).graph.ops[1]
    assert rows.moved_bytes == 2 * B * L * D * 4


def test_a_whole_model_by_formula() -> None:
    graph = trace(CASES["llama"].build(), CASES["llama"].batch()).graph
    linear = [op for op in graph.ops if op.kind == "module" and op.params and "norm" not in op.target]
    tokens = CASES["llama"].batch()["input_ids"].numel()
    for op in linear[1:]:
        assert op.flops == 2 * tokens * sum(graph.parameter(name).numel for name in op.params)


# ----------------------------------------------------------------------------------------------- kept for the backward
def really_saved(model: nn.Module, batch: Any, loss_fn: Any) -> int:
    """Bytes of the distinct storages that one real forward keeps, parameters and buffers excluded."""
    kept = {storage_key(t) for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in kept:
            found.setdefault(storage_key(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model(**batch) if isinstance(batch, dict) else model(batch)
        loss_fn(outputs, batch) if loss_fn else outputs.loss
    return sum(t.untyped_storage().nbytes() for t in found.values())  # a view keeps all of what it is a view of


def test_saved_bytes_of_an_mlp_are_those_of_a_real_run() -> None:
    model = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * D, D), nn.LayerNorm(D))
    batch = torch.randn(B, L, D)
    ours = sum(op.saved_bytes for op in trace(model, batch, mean).graph.ops)
    assert ours == really_saved(model, batch, mean)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "bert"])
def test_saved_bytes_of_a_model_are_close_to_those_of_a_real_run(name: str) -> None:
    """Within 1%: fake tensors take the same decompositions but for a few kernels' own scratch."""
    model, batch = CASES[name].build(), CASES[name].batch()
    ours = sum(op.saved_bytes for op in trace(model, batch, fuse=False).graph.ops)
    assert ours == pytest.approx(really_saved(model, batch, None), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------- memo
ENTRIES = [*(CASES[name] for name in ("gpt2", "t5", "swin", "mamba", "mixtral")), TOYS["lstm"]]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_is_copied_from_equal_calls_is_what_running_them_gives(entry: Any) -> None:
    """The graph with and without the memo: the same ops, shapes, costs and places to cut."""
    model, loss_fn = entry.build(), getattr(entry, "loss_fn", None)
    copied, run = (
        tracer._trace(model, entry.batch(), loss_fn, Choices(), torch.device("cpu"), memo=memo)
        for memo in (True, False)
    )
    for ours, theirs in zip(copied.graph.ops, run.graph.ops, strict=True):
        assert ours == theirs
    assert copied.graph == run.graph


def test_an_op_names_the_values_it_keeps_and_pays_for() -> None:
    """The second layer's input is the first one's output after an activation; its views count as the same memory."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Flatten(0, 1), nn.Linear(D, D), nn.Linear(D, D))
    ops = {op.name: op for op in trace(model, torch.randn(B, L, D), mean).graph.ops}
    tanh, flat = ops["_1"], ops["_2"]
    assert set(tanh.keeps) == {tanh.outputs[0].name, flat.outputs[0].name}, "tanh's backward reads its output"
    assert ops["_0"].keeps == ("batch",)
    assert ops["_3"].keeps == (), "it keeps what tanh pays for"
    assert ops["_4"].keeps == (ops["_3"].outputs[0].name,)
