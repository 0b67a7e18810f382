"""LoRA on frozen weights of four bits: as plain PyTorch trains on the same weights, and refused where it cannot be.

bitsandbytes itself is used where it is installed; else what we call of it stands in, written in plain torch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from merak_like import Mesh, auto_parallel, hf
from merak_like.deciding import alone
from merak_like.hf import lora
from merak_like.runtime import four_bit
from merak_like.runtime.four_bit import BLOCK, FourBit, quantise
from merak_like.trainer.config import Lora
from tests import training
from tests.ranks import Call, results_of, selected_calls
from tests.trainer_runs import build, data

LEVELS = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407,
          0.5626, 0.7230, 1.0]  # fmt: skip
"""Of nf4, to four digits (QLoRA, appendix E)."""


def stand_in() -> ModuleType:
    """What ``four_bit`` calls of ``bitsandbytes.functional``, with its signatures and shapes."""

    def get_4bit_type(kind: str, device: Any = None) -> Tensor:
        assert kind == "nf4"
        return torch.tensor(LEVELS, device=device)

    def quantize_4bit(
        A: Tensor, blocksize: int, quant_type: str, compress_statistics: bool
    ) -> tuple[Tensor, Any]:  # fmt: skip
        assert not compress_statistics
        blocks = A.float().reshape(-1, blocksize)
        absmax = blocks.abs().amax(1)
        levels = get_4bit_type(quant_type)
        nearest = ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(-1).flatten().to(torch.uint8)
        return (nearest[::2] * 16 + nearest[1::2])[:, None], SimpleNamespace(absmax=absmax)

    def dequantize_4bit(A: Tensor, quant_state: Any) -> Tensor:
        numbers = torch.stack([A[:, 0] // 16, A[:, 0] % 16], 1).flatten().long()
        blocks = quant_state.code[numbers].view(-1, quant_state.blocksize) * quant_state.absmax[:, None]
        return blocks.view(quant_state.shape).to(quant_state.dtype)

    functional = ModuleType("bitsandbytes.functional")
    functional.__dict__.update(
        get_4bit_type=get_4bit_type, quantize_4bit=quantize_4bit, dequantize_4bit=dequantize_4bit,
        QuantState=SimpleNamespace,
    )  # fmt: skip
    return functional


@pytest.fixture(params=["a stand-in", "bitsandbytes"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either of the two."""
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'merak-like[four-bit]'")
    else:
        made = stand_in()
        monkeypatch.setattr(four_bit, "library", lambda: made)


def subject() -> training.Subject:
    """A language model that learns additions to weights of four bits."""
    model = lora.wrap(build("llama"), Lora(r=4, dropout=0.1, base="nf4"))
    rows = data("llama", 19, 1)
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    count = hf.loss_weight(model)
    assert count is not None
    return training.Subject(model, lambda: batch, None, count)


@pytest.mark.usefixtures("library")
def test_a_layer_is_the_product_with_its_levels() -> None:
    """And what autograd keeps for it has four bits a number and a scale for each block."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 32)
    layer = FourBit(copy.deepcopy(plain), "nf4")
    whole = layer.whole(layer.weight, layer.scales, torch.float32)
    assert 0.02 < (whole - plain.weight).abs().mean() / plain.weight.abs().mean() < 0.2
    assert layer.weight.numel() == plain.weight.numel() // 2
    kept: list[Tensor] = []
    x, other = (torch.ones(3, 128).requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = layer(x)
    assert sum(t.nbytes for t in kept) < plain.weight.nbytes / 4
    expected = nn.functional.linear(other, whole, plain.bias)
    torch.testing.assert_close(made, expected)
    made.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.usefixtures("library")
def test_additions_learn_as_in_plain_torch(tmp_path: Path) -> None:
    one = subject()
    quantised = [name for name, module in one.model.named_modules() if isinstance(module, FourBit)]
    assert len(quantised) == 2 * 7, "every linear layer of both blocks, and not the output layer"
    batch = one.batch()
    ours = training.by_engine(one, [batch] * 3, 1, 1, 4)
    assert {name for name in ours.steps[0].gradients if "lora" not in name} == set()
    training.same(ours, training.plainly(one, [batch] * 3, 4), 1e-5)


@pytest.mark.usefixtures("library")
def test_a_checkpoint_has_the_four_bits(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        one = subject()
        with torch.no_grad():
            for module in one.model.modules():
                if isinstance(module, FourBit) and seed:
                    module.weight.fill_(0)
        engine = auto_parallel(one.model, example=one.batch(), hardware="a100-80gb", device="cpu")
        engine.load(tmp_path) if seed else engine.save(tmp_path)
        found.append({name: tensor.clone() for name, tensor in engine.full_state_dict().items()})
        engine.close()
    assert any(tensor.dtype == torch.uint8 for tensor in found[0].values())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.usefixtures("library")
def test_a_cast_to_another_precision_leaves_the_scales() -> None:
    layer = FourBit(nn.Linear(BLOCK, 4), "nf4")
    before = layer.scales.clone()
    assert torch.equal(layer.bfloat16().scales, before)
    assert layer(torch.ones(1, BLOCK, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"4-bit weights need bitsandbytes, but .*: pip install 'merak-like\[four-bit\]"
    ):
        quantise(build("llama"), "nf4")
    made = stand_in()
    monkeypatch.setattr(four_bit, "library", lambda: made)
    with pytest.raises(ValueError, match="no kind of 4-bit weights 'int4': there are nf4, fp4"):
        quantise(build("llama"), "int4")
    with pytest.raises(ValueError, match="Sequential has no linear layer of its own"):
        quantise(nn.Sequential(nn.Conv1d(2, 2, 1)), "nf4")
    with pytest.raises(ValueError, match="0 has no weights to keep in four bits: load the model first"):
        quantise(nn.Sequential(nn.Linear(2, 2, device="meta")), "nf4")
    one = subject()
    with pytest.raises(
        ValueError, match=r"q_proj\.base_layer has 4-bit weights, .*: tp=2 would cut through them; use pp"
    ):
        alone(one.model, Mesh(tp=2), one.batch(), hardware="a100-80gb")
    with pytest.raises(ValueError, match=r"zero=3 would cut through them"):
        alone(one.model, Mesh(dp=2), one.batch(), zero=3, hardware="a100-80gb")
    theirs = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    with pytest.raises(ValueError, match=r"0 is a Linear4bit of bitsandbytes, .*: load the model in full and let lora"):
        alone(nn.Sequential(theirs(4, 4)), Mesh(), torch.ones(2, 4), hardware="a100-80gb")


def spread(dp: int, pp: int) -> float:
    """How far additions on several ranks are from plain PyTorch."""
    with mock.patch.object(four_bit, "library", return_value=stand_in()):
        one = subject()
        batches = [one.batch()] * 3
        ours = training.by_engine(one, batches, dp, pp, 4 // dp)
        return training.same(ours, training.plainly(one, batches, 4), 1e-5) if ours.weights else 0.0


CALLS = [
    pytest.param(Call(f"four-bit-{dp}x{pp}", f"{__name__}:spread", {"dp": dp, "pp": pp}), id=f"{dp}x{pp}")
    for dp, pp in ((1, 2), (2, 1))
]


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """One job for all."""
    return results_of(selected_calls(request))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(200)
@pytest.mark.parametrize("call", CALLS)
def test_on_several_ranks(call: Call, result: Callable[[Call], list[Any]]) -> None:
    assert max(result(call)) <= 1e-5
