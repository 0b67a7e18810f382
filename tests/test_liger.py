"""Liger's kernels for output layer and loss: what they are given, and that all else is as with our own chunks.

They run on a GPU; here what we call of them stands in, written in plain torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime.methods import chunked_loss, liger
from merak_like.runtime.methods.head_loss import ChunkedLoss
from merak_like.trainer.methods import methods_of
from merak_like.trainer.settings import Methods
from tests.training import by_engine, in_one_precision, plainly, same


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a stand-in where Liger would be; what its losses are made with."""
    made: list[dict[str, Any]] = []

    class Loss(nn.Module):
        """With the signature of LigerFusedLinearCrossEntropyLoss."""

        def __init__(self, *, ignore_index: int, label_smoothing: float, reduction: str) -> None:
            super().__init__()
            self.options = {
                "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction
            }  # fmt: skip
            made.append(self.options)

        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.cross_entropy(F.linear(_input, lin_weight, bias), target, **self.options)

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(liger, "WHERE", ("cpu",))
    return made


def test_training_equals_plain_training(given: list[dict[str, Any]]) -> None:
    one = in_one_precision("llama")
    batches = [one.batch(8, 12), one.batch(8, 10)]
    ours = by_engine(one, batches, 1, 1, 2, methods=[ChunkedLoss(kernel="liger")])
    same(ours, plainly(one, batches, 2), 1e-10)
    assert len(given) == 2 * 2, "one for each micro-batch"
    assert {options["ignore_index"] for options in given} == {-100}


def test_a_run_can_ask_for_it(given: list[dict[str, Any]]) -> None:
    (method,) = methods_of(Methods.model_validate({"chunked_loss": "liger"}))
    assert (type(method), method.kernel) == (ChunkedLoss, "liger")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no kernel 'triton' for the loss: there are own, liger"):
        ChunkedLoss(kernel="triton")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, given: list[dict[str, Any]]) -> None:
    monkeypatch.setattr(liger, "WHERE", ("cuda", "xpu"))
    one = in_one_precision("llama")
    with pytest.raises(ValueError, match="Liger's kernels run on cuda and xpu, not on cpu: leave kernel out"):
        auto_parallel(
            one.model, example=one.batch(2, 8), optimizer=torch.optim.SGD, hardware="a100-80gb", device="cpu",
            methods=[ChunkedLoss(kernel="liger")],
        )  # fmt: skip
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match=r"needs liger-kernel and Triton, but .*: pip install 'merak-like\[liger\]'"):
        ChunkedLoss(kernel="liger")


@pytest.mark.gpu
def test_kernels_give_the_loss_and_gradients_of_our_chunks() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'merak-like[liger]'")
    found = []
    for way in (chunked_loss.linear_cross_entropy, liger.linear_cross_entropy):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (96, 500))
        target = torch.randint(0, 500, (96,), device="cuda")
        target[::5] = -100
        loss = way(hidden, weight, None, target, reduction="sum")
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
