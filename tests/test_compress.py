"""Few bits with a bound on every element, and what a training with them comes to."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import Mesh, Plan, auto_parallel, make_plan, trace
from merak_like._compat import StorageWeakRef, TorchDispatchMode
from merak_like.runtime.methods import quantiser
from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.planned_bytes import coder
from merak_like.runtime.methods.quantiser import quantise
from tests.peaks import Peak

TENSORS = {
    "normal": lambda: torch.randn(300, 70),
    "half zeros": lambda: torch.randn(300, 70).relu(),
    "outliers": lambda: torch.randn(300, 70) * torch.randn(300, 1) ** 5,
    "bfloat16": lambda: torch.randn(300, 70).bfloat16(),
    "double": lambda: torch.randn(300, 70).double() * 1e-30,
    "not finite": lambda: torch.cat([torch.randn(2000), torch.tensor([float("nan"), float("inf"), 1e30])]),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("share", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("entropy", [False, True])
def test_every_element_is_within_the_bound(kind: str, share: float, entropy: bool):
    torch.manual_seed(0)
    x = TENSORS[kind]()
    usual = x[x.isfinite()].double()
    bound = 3 * share * float(usual[usual.abs() < 1e20].square().mean().sqrt())
    packed = quantise(x, bound, entropy=entropy)
    if packed is None:
        assert share == 1e-3  # two bytes are not worth packing at this bound
        return
    y = packed.tensor()
    assert y.dtype == x.dtype
    odd = ~x.isfinite()
    assert torch.equal(y[odd].nan_to_num(7), x[odd].nan_to_num(7))
    assert float((y[~odd].double() - x[~odd].double()).abs().max()) <= bound
    assert torch.equal(y.sign()[~odd], x.sign()[~odd])


def test_bytes_are_those_of_what_is_kept():
    packed = quantise(torch.randn(64, 64), 0.03)
    assert packed is not None
    assert isinstance(packed.codes, Tensor)
    assert packed.nbytes == packed.codes.nbytes + packed.places.nbytes + packed.odd.nbytes + 16


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("share", [0.003, 0.05])
def test_slices_are_one_tensor(entropy: bool, share: float, monkeypatch: pytest.MonkeyPatch):
    """Bytes, and what is read from them, do not depend on how much is coded at once."""
    torch.manual_seed(0)
    x = torch.randn(10_001) * torch.randn(10_001) ** 3
    found: list[tuple[Tensor, Tensor, int]] = []
    for size in (quantiser.SLICE, 1024):
        monkeypatch.setattr(quantiser, "SLICE", size)
        packed = quantise(x, share * float(x.std()), entropy=entropy)
        assert packed is not None
        assert len(packed.odd) > 5
        found.append((packed.tensor(), packed.places, packed.width))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert (found[0][2] > 8) == (share < 0.01)


class Deep(nn.Module):
    """Layers of one width; ``shape`` of one input for convolutions."""

    def __init__(self, kind: str, layers: int = 4, width: int = 64) -> None:
        super().__init__()
        conv = kind == "conv"
        made = [nn.Conv2d(8, 8, 3, padding=1) if conv else nn.Linear(width, width) for _ in range(layers)]
        self.body = nn.Sequential(*(m for layer in made for m in (layer, nn.ReLU() if kind != "gelu" else nn.GELU())))
        self.head = nn.Linear(8 * 64 if conv else width, 10)
        self.conv = conv

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x.view(-1, 8, 8, 8) if self.conv else x
        return F.cross_entropy(self.head(self.body(x).flatten(1)), labels)


def batch(kind: str, size: int = 128) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(size, 512 if kind == "conv" else 64), "labels": torch.randint(10, (size,))}


def gradients(kind: str, *methods: Compress, **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    engine = auto_parallel(
        Deep(kind), example=batch(kind), hardware="a100-80gb", device="cpu", micro_batches=2, methods=methods, **more
    )
    engine.step(batch(kind))
    found = engine.full_gradients()
    engine.close()
    return found


@pytest.mark.parametrize("kind", ["conv", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("relu", "gelu"))])
def test_gradients_are_off_by_no_more_than_twice_the_bound(kind: str):
    exact = gradients(kind)
    for bound in (0.003, 0.01, 0.03):
        method = Compress(bound, adapt=False)
        found = gradients(kind, method)
        off = max(float((found[n] - g).norm() / g.norm()) for n, g in exact.items() if g.ndim > 1)
        assert 0 < off <= 2 * bound, (kind, bound, off)


def test_four_times_fewer_bytes_and_eight_with_the_entropy_coder():
    for entropy, times in ((False, 4), (True, 8)):
        method = Compress(0.03, entropy=entropy, adapt=False)
        gradients("relu", method)
        before, after = method.counted
        # the input and what each ReLU made, each once: 5 tensors of 128 x 64
        assert before == 5 * 128 * 64 * 4
        assert before >= times * after, (before, after)


class Alive(TorchDispatchMode):
    """How many results of a ReLU are still somewhere when the first of them is asked for by the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []
        self.found: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "threshold_backward" in str(func) and self.found is None:
            self.found = sum(not one.expired() for one in self.made)
        out = func(*args, **(kwargs or {}))
        if str(func) == "aten.relu.default":
            self.made.append(StorageWeakRef(out.untyped_storage()))
        return out


@pytest.mark.parametrize(("methods", "most"), [((), 8), ((Compress(0.02, adapt=False),), 0)])
def test_what_was_packed_is_nowhere_else(methods: tuple[Compress, ...], most: int):
    """Of the plain model all results are there."""
    engine = auto_parallel(Deep("linear", 8), example=batch("linear"), hardware="a100-80gb", device="cpu",
                           methods=methods)  # fmt: skip
    with Alive() as alive:
        engine.step(batch("linear"))
    engine.close()
    assert len(alive.made) == 8
    assert alive.found == most


def test_twelve_layers_take_half_of_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        quantiser, "SLICE", 2**12
    )  # as small beside a tensor of this test as the usual beside a real one
    some, most = batch("relu", 1024), list[int]()
    for methods in ((), (Compress(0.02, adapt=False),)):
        engine = auto_parallel(Deep("relu", 12), example=some, hardware="a100-80gb", device="cpu", methods=methods)
        with Peak(some.values()) as peak:
            engine.step(some)
        engine.close()
        most.append(peak.most)
    assert most[0] > 12 * 1024 * 64 * 4
    assert most[1] < 0.6 * most[0]


def test_what_is_run_again_is_not_compressed():
    method = Compress(adapt=False)
    exact = gradients("relu")
    found = gradients("relu", method, recompute="full")
    assert method.counted == (0, 0)
    assert all(torch.equal(found[name], g) for name, g in exact.items())


def test_a_split_backward_reads_what_was_packed():
    at_once, later = Compress(adapt=False), Compress(adapt=False)
    exact, plain, waited = gradients("relu"), gradients("relu", at_once), gradients("relu", later, schedule="zb-h1")
    assert later.counted == at_once.counted
    assert later.counted[0] > 4 * later.counted[1] > 0
    assert all(torch.allclose(waited[name], g, rtol=1e-5, atol=1e-7) for name, g in plain.items())
    packed = [name for name, g in exact.items() if g.ndim > 1]
    assert not any(torch.allclose(waited[name], exact[name], rtol=1e-5, atol=1e-7) for name in packed)


def test_each_layer_gets_a_bound_of_its_own():
    method = Compress(0.01)
    torch.manual_seed(0)
    engine = auto_parallel(
        Deep("relu"), example=batch("relu"), hardware="a100-80gb", device="cpu", methods=[method],
        optimizer=lambda p: torch.optim.AdamW(p, 1e-3),
    )  # fmt: skip
    engine.step(batch("relu"))
    assert method.bounds() == (0.01,) * 5  # there is no momentum before the first step
    for _ in range(50):
        engine.step(batch("relu"))
    assert any(a != b for a, b in pairwise(method.bounds()))
    assert all(1e-3 <= bound <= 0.1 for bound in method.bounds())
    engine.close()


def test_the_planner_weighs_packing_against_running_again():
    torch.manual_seed(0)
    model, some = Deep("relu", layers=8), batch("relu", 2048)
    plain = trace(model, some)
    packed = Compress().traced(plain, model)
    saved = [sum(op.saved_bytes for op in t.graph.ops) for t in (plain, packed)]
    assert saved[1] < saved[0] / 3

    def plan(limit: int | None) -> list[Plan]:
        more: dict[str, Any] = {"hardware": "a100-80gb", "batch": 16384, "micro_batches": 8, "memory_limit": limit}
        return [make_plan(t.graph, Mesh(1, 4), **more) for t in (plain, packed)]

    plans = plan(None)
    assert plans[1].rank_bytes[0] < plans[0].rank_bytes[0]
    assert sum(s.forward_seconds for s in plans[1].stages) > sum(s.forward_seconds for s in plans[0].stages)
    tight = plan((max(plans[0].rank_bytes) + max(plans[1].rank_bytes)) // 2)
    assert any(stage.recompute for stage in tight[0].stages)  # without packing something is run again
    assert not any(stage.recompute for stage in tight[1].stages)


@pytest.mark.parametrize(("bound", "entropy"), [(0.003, False), (0.01, False), (0.03, False), (0.03, True)])
def test_the_planner_counts_the_bytes_that_are_kept(bound: float, entropy: bool):
    torch.manual_seed(0)
    model, some, method = Deep("relu"), batch("relu", 2048), Compress(bound, entropy=entropy, adapt=False)
    plain = trace(model, some)
    graphs = plain.graph, method.traced(plain, model).graph
    counted = [sum(op.saved_bytes for op in graph.ops) for graph in graphs]
    engine = auto_parallel(model, example=some, hardware="a100-80gb", device="cpu", methods=[method])
    engine.step(some)
    engine.close()
    before, after = method.counted
    assert counted[0] - counted[1] + after == pytest.approx(before, rel=0.05)
    assert before - (counted[0] - counted[1]) == pytest.approx(after, rel=0.15)


def test_packing_is_priced_as_it_was_measured():
    """The figures of the planner are those of the table of benchmarks/methods, which says how they were found."""
    table = (Path(__file__).resolve().parents[1] / "benchmarks/methods/README.md").read_text(encoding="utf-8")
    for entropy, name in ((False, "bound 0.01"), (True, "bound 0.01 and Huffman")):
        (row,) = re.findall(rf"\| {name}: bytes that could be moved .* \| (\d+) (\d+) \|\n", table)
        priced = coder(0.01, entropy=entropy)
        for found, counted in zip(row, (priced.pack, priced.unpack), strict=True):
            assert 1 / 1.6 < float(found) / counted < 1.6  # as far apart as two measurements here


def test_a_bound_that_is_none_is_refused():
    with pytest.raises(ValueError, match="share of a tensor's range"):
        Compress(1.5)
