"""What a trace promises: nothing allocated, nothing changed, everything written down, or a named error."""

from __future__ import annotations

import copy
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.tracer import Trace, TraceError, trace
from merak_like.runtime.local import LocalPipeline
from merak_like.runtime.stage_code import build_stages
from tests.zoo.hugging_face import CASES
from tests.zoo.staged import even_starts
from tests.zoo.traps import Layers, inputs

WIDTH = 8


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return x


def square(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().mean()


def llama(layers: int = 4, **more: Any) -> transformers.LlamaForCausalLM:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, **({"vocab_size": 100, "use_cache": False} | sizes | more)
    )
    return transformers.LlamaForCausalLM(config).train()


def words(size: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.arange(size * length).reshape(size, length) % 90
    return {"input_ids": ids, "labels": ids}


def seen(recorded: Trace) -> list[tuple[Any, ...]]:
    return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in recorded.code.nodes]


# ------------------------------------------------------------------------------------------------ nothing is allocated
def test_a_70b_llama_on_meta_is_traced_without_a_weight() -> None:
    with torch.device("meta"):
        model = llama(
            80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
            vocab_size=128256,
        )  # fmt: skip
    ids = torch.zeros(4, 2048, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = trace(model, {"input_ids": ids, "labels": ids}).graph
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000, f"{grown / 1e6:.2f} GB for a graph of {len(graph.ops)} ops"
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel for p in graph.parameters if not p.buffer) > 70e9


# -------------------------------------------------------------------------------------------------- nothing is changed
@lru_cache
def _positions(length: int) -> Tensor:
    return torch.arange(length).float()


class Careless(MLP):
    """Keeps what it should not: a cache, counters, a list, an object's attribute."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.seen: list[Any] = []
        self.config = transformers.LlamaConfig(num_hidden_layers=1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + _positions(x.shape[-1])
        self.count += 1
        self.seen.append(x)
        self.config.last = x
        if self.fails:
            raise ArithmeticError("half way")
        return super().forward(x, scale)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    def snapshot() -> list[Any]:
        return [
            {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()} for module in model.modules()
        ]

    before, tensors = snapshot(), {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert {k: id(v) for k, v in after.items()} == {k: i for k, (i, _) in tensors.items()}
    assert all(torch.equal(v, tensors[k][1]) for k, v in after.items())
    for old, new in zip(before, snapshot(), strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert new[key] is value or new[key] == value


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Careless(fails)
    module_call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    with unchanged(model):
        if fails:
            with pytest.raises(ArithmeticError, match="half way"):
                trace(model, torch.ones(2, WIDTH), square)
        else:
            trace(model, torch.ones(2, WIDTH), square)
    assert nn.Module.__call__ is module_call
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert model.seen == []
    assert not hasattr(model.config, "last")
    model.fails = False
    model(torch.ones(2, WIDTH)).sum().backward()  # neither the cache nor a patch kept a fake tensor
    assert model.count == 1


def test_hooks_are_left_as_they_were() -> None:
    model, calls = MLP(), []
    model.layers[1].register_forward_hook(lambda *_: calls.append("forward"))
    model.layers[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    with unchanged(model):
        trace(model, torch.ones(2, WIDTH), square)
    calls.clear()
    square(model(torch.ones(2, WIDTH)), None).backward()
    assert calls == ["forward", "backward"]


def test_two_traces_of_one_model_are_equal() -> None:
    model = CASES["t5"].build()
    one, two = (trace(model, CASES["t5"].batch()) for _ in range(2))
    assert one.graph == two.graph
    assert seen(one) == seen(two)


# ------------------------------------------------------------------------------------------------- what the graph says
def test_ties_are_found_by_storage_and_not_by_shape() -> None:
    model = MLP()
    layers: Any = model.layers
    layers[3].weight = layers[0].weight  # 1 and 2 have the same shape and even the same numbers
    layers[2].weight.data.copy_(layers[1].weight.data)
    assert trace(model, torch.ones(2, WIDTH), square).graph.ties == (("layers.0.weight", "layers.3.weight"),)
    with torch.device("meta"):
        assert trace(llama(tie_word_embeddings=True), words()).graph.ties == (
            ("model.embed_tokens.weight", "lm_head.weight"),
        )


class FarAway(MLP):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        kept = self.layers[0](x) + 1.0
        x = self.layers[2](self.layers[1](kept))
        kept[:, 1:].mul_(0.5)
        return self.layers[3](x + kept)


def test_what_is_changed_in_place_is_pinned_to_its_maker() -> None:
    graph = trace(FarAway(), torch.ones(2, WIDTH), square).graph
    names = [op.name for op in graph.ops]
    made, changed = names.index("add"), next(i for i, op in enumerate(graph.ops) if op.mutates)
    assert (made, changed) in graph.pinned
    legal = set(find_cuts(graph).positions.tolist())
    assert not legal & set(range(made + 1, changed + 1))
    assert {made, changed + 1} <= legal


def test_the_graph_as_networkx_sees_it() -> None:
    graph = trace(MLP(), torch.ones(2, WIDTH), square).graph
    view = graph.to_networkx()
    assert list(view.nodes) == [op.name for op in graph.ops]
    assert [value.name for value in view.edges["layers_0", "tanh"]["values"]] == ["layers_0"]
    assert view.nodes["layers_0"]["op"].params == ("layers.0.weight", "layers.0.bias")


def test_train_and_eval_are_different_traces() -> None:
    model = Layers()
    model.layers.append(nn.Dropout(0.5))
    training = trace(model.train(), inputs(), lambda out, batch: out.mean())
    evaluating = trace(model.eval(), inputs(), lambda out, batch: out.mean())
    assert (training.training, evaluating.training) == (True, False)
    assert any(op.random for op in training.graph.ops)
    assert not any(op.random for op in evaluating.graph.ops)
    pipeline = LocalPipeline(evaluating, model, even_starts(evaluating.graph, 2))
    assert torch.equal(pipeline.step(inputs())["loss"], model(**inputs()).mean())


# --------------------------------------------------------------------------------------------------- stages as modules
def test_a_llama_layer_is_one_call_in_a_stage_and_its_hooks_run() -> None:
    model, calls = llama(), []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    recorded = trace(model, words())
    calls.clear()
    middle = next(call.first for call in recorded.graph.calls if call.path == "model.layers.2")
    starts = (0, middle, len(recorded.graph.ops))
    stages = build_stages(recorded, model, starts)
    targets = [[str(n.target) for n in stage.pieces[0].module.graph.nodes if n.op == "call_module"] for stage in stages]
    assert {"model.layers.0", "model.layers.1"} <= {*targets[0]}
    assert {"model.layers.2", "model.layers.3"} <= {*targets[1]}
    assert not any(target.startswith("model.layers.1.") for target in targets[0])
    LocalPipeline(recorded, model, starts).step(words())
    assert calls == [1]


def test_a_compiled_block_stays_whole_and_compiled() -> None:
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(MLP(depth=2), MLP(depth=2), MLP(depth=2))
    compiling: Any = torch.compile(model[1], backend=backend)
    model[1] = compiling
    recorded = trace(model, torch.ones(2, WIDTH), square)
    assert not compiled
    inside = [i for i, op in enumerate(recorded.graph.ops) if op.scope.startswith("1")]
    assert not set(find_cuts(recorded.graph).positions.tolist()) & set(inside[1:])
    pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
    pipeline.step(torch.ones(2, WIDTH))
    pipeline.step(torch.ones(2, WIDTH))
    assert len(compiled) == 1


def test_an_atomic_module_stays_whole_or_is_refused() -> None:
    model = llama()
    graph = trace(model, words(), atomic=["LlamaDecoderLayer"]).graph
    legal = set(find_cuts(graph).positions.tolist())
    for call in graph.calls:
        if call.type == "LlamaDecoderLayer":
            assert not legal & set(range(call.first + 1, call.stop))

    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, box: Box) -> Tensor:
            return self.inner(box.x)

    class Boxing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxed = Boxed()

        def forward(self, x: Tensor) -> Tensor:
            return self.boxed(Box(x * 2.0))

    trace(Boxing(), torch.ones(2, WIDTH), square)
    with pytest.raises(TraceError, match=r"boxed must stay whole .* it is called with an object of type .*Box"):
        trace(Boxing(), torch.ones(2, WIDTH), square, atomic=["boxed"])


# ------------------------------------------------------------------------------------------------------------ autocast
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_ambient_autocast_gives_the_same_loss(name: str) -> None:
    torch.manual_seed(0)
    model, batch = CASES[name].build(), CASES[name].batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded = trace(model, batch, fuse=False)
        pipeline = LocalPipeline(recorded, copy.deepcopy(model), even_starts(recorded.graph, 3))
        torch.manual_seed(1)
        ours = pipeline.step(batch)["loss"]
        torch.manual_seed(1)
        theirs = model(**batch).loss
    assert torch.equal(ours, theirs)
    assert any(value.dtype == "bfloat16" for op in recorded.graph.ops for value in op.outputs)


class HalfWay(MLP):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layers[1](self.layers[0](x))
            with torch.autocast("cpu", enabled=False):
                x = self.layers[2](x.float())
        return self.layers[3](x)


def test_autocast_inside_the_model_follows_its_ops_across_cuts() -> None:
    torch.manual_seed(0)
    model, x = HalfWay(), torch.randn(4, WIDTH)
    recorded = trace(model, x, square)
    for position in find_cuts(recorded.graph).positions[1:].tolist():
        pipeline = LocalPipeline(recorded, model, (0, position, len(recorded.graph.ops)))
        assert torch.equal(pipeline.step(x)["loss"], square(model(x), x).detach())
        assert not torch.is_autocast_enabled("cpu")
