"""SFT's narrow place: what crosses the cut is z alone, and nothing else of the model has changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.tracer import trace
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.stage_code import build_stages
from merak_like.split.sft import Narrow, Wire, cut_of, sft

transformers = pytest.importorskip("transformers")

WIDTH, VOCABULARY = 24, 40


class Torch(nn.Module):
    """torch's own encoder layers, with a head and a loss."""

    def __init__(self, norm_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 48, dropout, "gelu", batch_first=True, norm_first=norm_first)
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.token(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=3, n_head=2, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.BloomForCausalLM(config)


def decoder(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


#: Model -> how to make it, the layer, its first matrices, and the module whose input is the residual (None: post-LN).
MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], str | None]] = {
    "BERT": (bert, "bert.encoder.layer.1", ("intermediate.dense",), None),
    "GPT-2": (gpt2, "transformer.h.1", ("mlp.c_fc",), "ln_2"),
    "Llama": (
        lambda: decoder("Llama", num_key_value_heads=1), "model.layers.1", ("mlp.gate_proj", "mlp.up_proj"),
        "post_attention_layernorm",
    ),
    "Phi-3": (
        lambda: decoder("Phi3", num_key_value_heads=2, original_max_position_embeddings=32), "model.layers.1",
        ("mlp.gate_up_proj",), "post_attention_layernorm",
    ),
    "OPT": (
        lambda: decoder("OPT", ffn_dim=48, word_embed_proj_dim=WIDTH, dropout=0.0), "model.decoder.layers.1", ("fc1",),
        "final_layer_norm",
    ),
    "Gemma-2": (
        lambda: decoder("Gemma2", num_key_value_heads=1, head_dim=12), "model.layers.1",
        ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm",
    ),
    "Bloom": (bloom, "transformer.h.1", ("mlp.dense_h_to_4h",), "post_attention_layernorm"),
    "torch post-LN": (lambda: Torch(False), "layers.1", ("linear1",), None),
    "torch pre-LN": (lambda: Torch(True), "layers.1", ("linear1",), "norm2"),
}  # fmt: skip


def batch(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids}


def made(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    build, layer, _, _ = MODELS[name]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not at their start, too
            parameter += 0.05 * torch.randn_like(parameter)
    return model, layer


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def first_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def seen(model: nn.Module, layer: str, inner: str | None) -> dict[str, Tensor]:
    """The layer's input and output, and its residual, in one pass."""
    found: dict[str, Tensor] = {}
    block = model.get_submodule(layer)
    hooks = [block.register_forward_hook(lambda m, a, o: found.update(out=first_of(o).detach()))]
    if inner is not None:
        at = block.get_submodule(inner)
        hooks.append(at.register_forward_pre_hook(lambda m, a: found.update(residual=a[0].detach())))
    model(**batch())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", [name for name, (_, _, _, inner) in MODELS.items() if inner])
def test_at_full_rank_only_the_residual_is_gone(name: str):
    """Pre-LN: what the layer gives is what it gave, less the residual."""
    model, layer = made(name)
    inner = MODELS[name][3]
    before = seen(model, layer, inner)
    found = sft(model, batch(), layer, WIDTH)
    assert found.first == tuple(f"{layer}.{path}" for path in MODELS[name][2])
    torch.testing.assert_close(
        seen(model, layer, inner)["out"], before["out"] - before["residual"].view_as(before["out"])
    )


@pytest.mark.parametrize("name", ["BERT", "torch post-LN"])
def test_surrogate_at_full_rank_is_the_residual_of_a_post_norm_layer(name: str):
    """There the residual is h itself, and P z = V^T S^-1 S V h = h: the whole model is as it was."""
    model, layer = made(name)
    before = model(**batch())["logits"]
    plain = copy.deepcopy(model)
    sft(model, batch(), layer, WIDTH, skip="surrogate")
    torch.testing.assert_close(model(**batch())["logits"], before)
    sft(plain, batch(), layer, WIDTH)
    assert not torch.allclose(plain(**batch())["logits"], before, atol=1e-3)


@pytest.mark.parametrize("skip", ["none", "surrogate"])
def test_z_alone_crosses_the_cut_and_both_halves_equal_the_whole(name: str, skip: str):
    model, layer = made(name)
    sft(model, batch(), layer, 5, skip=skip)
    traced = trace(model, batch())
    cut = cut_of(traced.graph, layer)
    starts = (0, cut, len(traced.graph.ops))
    crossing = crossings(traced.graph, starts)
    learned = [c for c in crossing if c.requires_grad]
    assert [c.value for c in learned] == [traced.graph.ops[cut - 1].outputs[0].name]
    assert (math.prod(learned[0].shape), learned[0].shape[-1]) == (2 * 7 * 5, 5)  # OPT flattens the tokens
    assert not {c.value for c in crossing} & set(traced.inputs)  # no token ids
    whole = model(**batch())["loss"]
    whole.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (edge,), (cloud,) = (stage.pieces for stage in build_stages(traced, model, starts))
    inputs = batch()
    sent = dict(zip(edge.made, edge.module(*(inputs[n] for n in edge.inputs)), strict=True))
    arrived = {n: v.detach().requires_grad_(v.requires_grad) for n, v in sent.items()}
    out = cloud.module(*(inputs[n] for n in cloud.inputs), *(arrived[n] for n in cloud.received))
    loss = dict(zip(cloud.made, out, strict=True))["loss"]
    torch.testing.assert_close(loss, whole)
    loss.backward()
    for n, value in sent.items():
        if value.requires_grad:
            value.backward(arrived[n].grad)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for n, gradient in wanted.items():
        torch.testing.assert_close(found[n], gradient, msg=lambda m, n=n: f"{n}: {m}")


def test_other_shapes_and_evaluation_run_the_changed_model(name: str):
    model, layer = made(name)
    sft(model, batch(), layer, 5)
    for size in ((3, 11), (1, 4)):
        training = model.train()(**batch(*size))["logits"]
        with torch.no_grad():  # torch's layers have a fused path here that reads the weights
            torch.testing.assert_close(model.eval()(**batch(*size))["logits"], training)


def test_names_are_kept_and_the_new_ones_are_few(name: str):
    model, layer = made(name)
    first = [f"{layer}.{path}" for path in MODELS[name][2]]
    before = dict(model.named_parameters())
    sft(model, batch(), layer, 5)
    after = dict(model.named_parameters())
    gone = {n for path in first for n in (f"{path}.weight", f"{path}.bias") if n in before}
    new = {f"{layer}.wire.v.weight", f"{layer}.wire.s.weight"}
    new |= {f"{path}.u.{kind}" for path in first for kind in ("weight", "bias") if f"{path}.{kind}" in before}
    assert before.keys() - after.keys() == gone
    assert after.keys() - before.keys() == new
    assert all(after[n] is before[n] for n in before.keys() & after.keys())
    assert after[f"{layer}.wire.s.weight"].shape == (5, 5)
    assert all(after[n].requires_grad for n in new)
    other = MODELS[name][0]().double()
    sft(other, batch(), layer, 5)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**batch())["logits"], model(**batch())["logits"])


def test_it_trains_and_s_does_not_stay_diagonal(name: str):
    model, layer = made(name)
    sft(model, batch(), layer, 4, skip="surrogate")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses: list[float] = []
    for _ in range(12):
        loss = model(**batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    s = model.get_parameter(f"{layer}.wire.s.weight").detach()
    assert (s - s.diag().diag()).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_recompute_inside_the_model_gives_the_same_gradients(name: str):
    model, layer = made(name)
    sft(model, batch(), layer, 5)
    model.train()(**batch(), use_cache=False)["loss"].backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model(**batch(), use_cache=False)["loss"].backward()
    for n, p in model.named_parameters():
        if n in wanted:
            torch.testing.assert_close(p.grad, wanted[n])


def test_two_layers_may_be_changed_and_copies_are_their_own():
    model, layer = made("GPT-2")
    sft(model, batch(), layer, 5)
    twin = copy.deepcopy(model)
    sft(twin, batch(), "transformer.h.2", 3)
    assert isinstance(twin.get_submodule("transformer.h.2"), Narrow)
    assert not isinstance(model.get_submodule("transformer.h.2"), Narrow)
    wires = [m for m in twin.modules() if isinstance(m, Wire)]
    assert [w.rank for w in wires] == [5, 3]
    with torch.no_grad():
        for wire in wires:
            wire.s.weight.zero_()
    assert model(**batch())["loss"] != twin(**batch())["loss"]
    assert model.get_parameter(f"{layer}.wire.s.weight").detach().any()


def test_models_without_memory_are_changed_too():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = bert()
    sft(model, batch(), "bert.encoder.layer.1", 5)
    assert model.get_parameter("bert.encoder.layer.1.wire.v.weight").is_meta
    graph = trace(model, batch()).graph
    assert graph.values[graph.ops[cut_of(graph, "bert.encoder.layer.1") - 1].outputs[0].name].shape == (2, 7, 5)


def test_sft_and_a_codec_share_the_wire():
    """bert-base's shape: z is 96 times smaller than h at rank 8, and 4 bits of its change 750 times."""
    h, z = torch.zeros(32, 128, 768), torch.randn(32, 128, 8)
    assert h.nbytes / codec("identity").encode(z).numel() > 95.9
    near = codec("aqsgd(4)|int4")
    context = Context(samples=tuple(range(32)))
    near.encode(z, context)
    assert h.nbytes / near.encode(z + 0.1, context).numel() > 750
    back = Context(direction="backward")
    assert 2 * h.nbytes / (near.encode(z, context).numel() + near.encode(z, back).numel()) > 750
