"""Linear layers in float8: torchao's own numbers, and a clear word where something is missing."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from enum import Enum
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime.methods import float8
from merak_like.runtime.methods.compiled import Compiled
from merak_like.runtime.methods.float8 import Float8
from merak_like.runtime.methods.method import Job, Methods

with_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install 'merak-like[float8]'"
)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchao that is there, for what is decided before it is used."""
    names = Enum("Names", {"A": "tensorwise", "B": "rowwise"})
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.float8", SimpleNamespace(Float8LinearRecipeName=names))


def model() -> nn.Module:
    """A layer of odd sides between others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10))


def loss(out: Tensor, batch: Tensor) -> Tensor:
    return out.square().mean()


BATCHES = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def engine(*methods: Any, of: nn.Module | None = None, **more: Any) -> Any:
    return auto_parallel(
        of or model(), example=BATCHES[0], loss_fn=loss, micro_batches=2, hardware="a100-80gb", device="cpu",
        methods=methods, optimizer=lambda p: torch.optim.SGD(p, 0.1), **more,
    )  # fmt: skip


@with_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("more", [{}, {"recompute": "full"}, {"schedule": "zb-h1"}], ids=str)
def test_numbers_are_torchaos(recipe: str, more: dict[str, Any]) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore

    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    plain = copy.deepcopy(model())
    wide = lambda module, name: all(side % 16 == 0 for side in module.weight.shape)  # noqa: E731
    convert_to_float8_training(plain, config=config, module_filter_fn=wide)
    exact, ours = engine(), engine(Float8(recipe, emulate=True), **more)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for batch in BATCHES:
        optimizer.zero_grad()
        for part in batch.chunk(2):
            (loss(plain(part), part) / 2).backward()
        optimizer.step()
        ours.step(batch)
        exact.step(batch)
    found, without = ours.full_state_dict(), exact.full_state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in plain.state_dict().items())
    assert not all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in without.items())
    ours.close()
    exact.close()


def test_each_call_has_its_own_bias(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer was remembered by its weight, with the bias of the first call. Here torchao's layers are plain ones."""

    class Config(NamedTuple):
        emulate: bool = False
        from_recipe_name = staticmethod(lambda recipe: Config())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 6)
            self.first, self.second = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight, self.first), self.weight, self.second)

    torchao: Any = sys.modules["torchao.float8"]
    torchao.Float8LinearConfig, torchao.convert_to_float8_training = Config, lambda module, config: module
    monkeypatch.setattr(float8, "replace", lambda of, **more: of if isinstance(of, Config) else replace(of, **more))
    plain, method = Twice(), Float8(emulate=True)
    ours = engine(method, of=copy.deepcopy(plain))
    assert ours.step(BATCHES[0]).loss == pytest.approx(loss(plain(BATCHES[0]), BATCHES[0]).item())
    ours.close()
    assert not method._layers, "and lets go of it"


def test_torchao_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"needs torchao, but .*: pip install 'merak-like\[float8\]'"):
        Float8()


@pytest.mark.usefixtures("known")
def test_what_a_device_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a device of type cpu has no such products: use precision='bf16', or Float8"):
        engine(Float8())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert float8.lacking(torch.device("cuda", 0)) == "cuda:0 has CUDA capability 8.0, not 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not float8.lacking(torch.device("cuda", 0))


@pytest.mark.usefixtures("known")
def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe='blockwise' is none of torchao's: tensorwise, rowwise"):
        Float8("blockwise")
    with pytest.raises(ValueError, match="no weight on this rank whose two sides are multiples of 16"):
        engine(Float8(emulate=True), of=nn.Linear(32, 10))
    with pytest.raises(ValueError, match="which Compiled hides"):
        Methods([Float8(emulate=True), Compiled()], Job("1f1b", 1, 1, 0))
