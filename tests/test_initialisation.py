"""Models on the meta device start as the model itself would start, and the same on every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from merak_like import Mesh, hf, make_plan, trace
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.tensor_parallel.layout import Axis
from merak_like.runtime.initialising import reset_parameters
from merak_like.runtime.materialize import fill, materialize
from merak_like.runtime.tensor_parallel.shards import Shards

CPU = torch.device("cpu")


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=64, n_layer=4, n_head=4))


def t5() -> nn.Module:
    config = T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


class Home(nn.Module):
    """Torch's own layers, some of which are initialised by the module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


def plan_of(build: Callable[[], nn.Module], pp: int) -> Plan:
    with torch.device("meta"):
        model = build().train()
    if isinstance(model, Home):
        graph = trace(model, torch.zeros(2, 5, 32), lambda loss, batch: loss).graph
    else:
        graph = trace(model, hf.example_for(model, 2, 8)).graph
    return make_plan(graph, Mesh(pp=pp), hardware="a100-80gb", batch=4)


def made(build: Callable[[], nn.Module], plan: Plan, stage: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = build()
    initialise = None if isinstance(model, Home) else hf.initialiser(model)
    return {n: p.detach() for n, p in materialize(model, plan, [stage], CPU, seed=1, initialise=initialise).items()}


@pytest.mark.parametrize("build", [gpt2, t5, Home])
def test_meta_weights_are_distributed_as_the_models_own(build: Callable[[], nn.Module]):
    """GPT-2 scales the projections that end a residual branch, from the module around them; it was left out once."""
    torch.manual_seed(0)
    own = build().state_dict()
    weights = made(build, plan_of(build, 1), 0)
    wrong = [
        (name, float(own[name].std()), float(weight.std()))
        for name, weight in weights.items()
        if not torch.isclose(weight.std(), own[name].std(), rtol=0.25, atol=1e-9) and weight.numel() > 100
    ]
    constant = [n for n, w in weights.items() if own[n].numel() > 1 and not own[n].std() and not w.equal(own[n])]
    assert not wrong
    assert not constant


@pytest.mark.parametrize("build", [gpt2, t5, Home])
def test_every_layout_starts_from_the_same_weights(build: Callable[[], nn.Module]):
    whole = made(build, plan_of(build, 1), 0)
    plan = plan_of(build, 3 if build is not Home else 2)
    for stage in range(len(plan.stages)):
        for name, weight in made(build, plan, stage).items():
            torch.testing.assert_close(weight, whole[name], rtol=0, atol=0)


def test_no_two_tensors_draw_the_same_numbers():
    weights = made(gpt2, plan_of(gpt2, 1), 0)
    heads = [tuple(w.flatten()[:4].tolist()) for w in weights.values() if w.std()]
    assert len(set(heads)) == len(heads)


def test_weights_with_data_keep_it_beside_weights_without():
    with torch.device("meta"):
        model = gpt2()
    model.transformer.h[1].mlp = GPT2LMHeadModel(model.config).transformer.h[1].mlp  # type: ignore[union-attr]
    before = {n: p.clone() for n, p in model.named_parameters() if not p.is_meta}
    assert before
    after = materialize(model, plan_of(gpt2, 1), [0], CPU, seed=1, initialise=hf.initialiser(model))
    for name, weight in before.items():
        torch.testing.assert_close(after[name].detach(), weight, rtol=0, atol=0)


class Twins(nn.Module):
    """One weight is a copy of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.other.weight.copy_(self.one.weight)


def plain() -> nn.Module:
    """Modules of several sizes, each of which begins by itself."""
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 20), nn.Embedding(10, 4)))


@pytest.mark.parametrize(
    "build", [*(pytest.param(build, marks=pytest.mark.slow) for build in (gpt2, t5)), plain, Twins]
)
def test_no_more_than_one_module_is_whole_before_it_is_cut(build: Callable[[], nn.Module]):
    with torch.device("meta"):
        model = build()
    names = {name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    ties = [("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")]
    ties = [("transformer.wte.weight", "lm_head.weight")] if build is gpt2 else ties if build is t5 else []
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    own = reset_parameters if build in (plain, Twins) else hf.initialiser(model)
    most = [0]

    def initialise(module: nn.Module) -> None:
        own(module)
        most[0] = max(most[0], sum(p.nbytes for p in model.parameters() if not p.is_meta))

    whole = copy.deepcopy(model)
    fill(
        whole,
        names,
        ties,
        CPU,
        seed=1,
        initialise=reset_parameters if build in (plain, Twins) else hf.initialiser(whole),
    )
    layouts = {
        name: ((Axis(len(p), 2),), *((Axis(size),) for size in p.shape[1:]))
        for name, p in model.named_parameters()
        if len(p) % 2 == 0
    }
    shards = Shards(layouts, 1, 2)
    fill(model, names, ties, CPU, seed=1, initialise=initialise, shards=shards)
    for name, tensor in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), shards.cut(name, tensor), rtol=0, atol=0)
    if build is not Twins:
        assert most[0] == largest
