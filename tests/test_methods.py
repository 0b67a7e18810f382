"""Methods that plug into an engine: the same numbers as plain PyTorch, and a clear word where one does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import Engine, auto_parallel
from merak_like.partitioner.tracer import trace
from merak_like.runtime.batches import rows
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.chunked_loss import linear_cross_entropy
from merak_like.runtime.methods.compiled import Compiled
from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.experts import CentralMask
from merak_like.runtime.methods.flat_adamw import FlatAdamW
from merak_like.runtime.methods.head_loss import ChunkedLoss
from merak_like.runtime.methods.kfac import Kfac
from merak_like.runtime.methods.method import Job, Method, Methods, Place
from merak_like.runtime.methods.projection import LowRank
from merak_like.runtime.methods.wrapped import AfterSum
from merak_like.trainer.groups import optimizer_factory
from merak_like.trainer.methods import methods_of
from merak_like.trainer.settings import Settings
from tests.training import Subject, by_engine, in_one_precision, plainly, same

CHUNK = 4 * 64 * 5
"""Some rows of the tests' vocabularies."""


def head(rows: int = 37, vocabulary: int = 101, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, 16), (vocabulary, 16), (vocabulary,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1, "ignore_index": 7}])
def test_chunks_give_the_loss_and_gradients_of_all_rows(options: dict[str, Any]):
    x, w, b = head()
    target = torch.randint(101, (37,))
    target[::5] = options.get("ignore_index", -100)
    ours = linear_cross_entropy(x, w, b, target, chunk_bytes=101 * 4 * 5, **options)
    theirs = F.cross_entropy(F.linear(x, w, b), target, **options)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, c in zip(torch.autograd.grad(3 * ours, (x, w, b)), torch.autograd.grad(3 * theirs, (x, w, b)), strict=True):
        assert torch.allclose(a, c, rtol=1e-10, atol=1e-14)


def test_chunks_under_autocast_are_as_exact_as_torch():
    x, w, b = head(dtype=torch.float32)
    target = torch.randint(101, (37,))
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), (x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(linear_cross_entropy(x, w, b, target, chunk_bytes=2000), (x, w, b))
        theirs = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), (x, w, b))
    for a, c, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == c.dtype == torch.float32
        assert (a - e).norm() <= 1.5 * (c - e).norm()


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("gpt2", "full")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "none"), ("gpt2", "none"), ("bert", "full"))],
)
def test_a_model_trains_without_its_logits(name: str, recompute: str):
    one = in_one_precision(name)
    batches = [one.batch(4, 12), one.batch(4, 12)] if name != "bert" else [one.batch(4, 12)]
    ours = by_engine(one, batches, 1, 1, 2, methods=[ChunkedLoss(CHUNK)], recompute=recompute, optimizer=flat)
    same(ours, plainly(one, batches, 2), 1e-10)


def flat(parameters: Any) -> torch.optim.Optimizer:
    return FlatAdamW(parameters, lr=1e-3, weight_decay=0.1)


def test_the_logits_are_gone_from_the_recorded_model():
    one = in_one_precision("gpt2")
    batch = one.batch(2, 12)
    plain = trace(one.model, batch)
    found = ChunkedLoss().traced(trace(one.model, batch), one.model)
    vocabulary = one.model.get_submodule("lm_head").get_parameter("weight").shape[0]
    assert any(v.shape[-1:] == (vocabulary,) for v in plain.graph.values.values())
    assert not any(v.shape[-1:] == (vocabulary,) for v in found.graph.values.values())
    assert set(found.graph.outputs) == {"loss"}
    saved = [sum(op.saved_bytes for op in t.graph.ops) for t in (plain, found)]
    assert saved[1] < saved[0]


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x)
        return F.cross_entropy(logits, labels) + logits.logsumexp(-1).mean()


class NoHead(TwoReaders):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).relu(), labels)


@pytest.mark.parametrize(("model", "word"), [(TwoReaders(), "read by logsumexp too"), (NoHead(), "relu")])
def test_a_loss_of_another_kind_is_refused(model: nn.Module, word: str):
    found = trace(model, {"x": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match=word):
        ChunkedLoss().traced(found, model)


def test_methods_refuse_the_jobs_they_cannot_serve():
    with pytest.raises(ValueError, match="use tp=1"):
        Methods([ChunkedLoss()], Job("1f1b", 2, 1, 0))
    with pytest.raises(ValueError, match="zb-h1, whose W waits at each layer: use 1f1b"):
        Methods([Compiled()], Job("zb-h1", 1, 1, 0))
    with pytest.raises(ValueError, match="tp_shares=1"):
        Methods([Compiled()], Job("1f1b", 2, 2, 0))
    with pytest.raises(ValueError, match="Compress sees each layer"):
        Methods([Compiled(), Compress()], Job("1f1b", 1, 1, 0))
    with pytest.raises(ValueError, match="methods= takes"):
        Methods(["compile"], Job("1f1b", 1, 1, 0))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="zero=3 runs the model whole"):
        Methods([Compiled()], Job("1f1b", 1, 1, 3))


@pytest.mark.parametrize("job", [Job("1f1b", 1, 1, 1), Job("1f1b", 1, 1, 0, lowered=True)], ids=["zero", "precision"])
@pytest.mark.parametrize(
    "method", [Kfac(), CentralMask(0.5), LowRank(2, 1), Compress(0.02)], ids=lambda m: type(m).__name__
)
def test_gradients_that_lie_elsewhere_are_refused_by_who_would_not_find_them(method: Method, job: Job):
    with pytest.raises(ValueError, match=r"(zero=1|precision=)"):
        Methods([method], job)


def test_many_chunks_add_up_in_more_than_the_logits_precision():
    torch.manual_seed(0)
    hidden, weight = torch.randn(8192, 16, dtype=torch.bfloat16), torch.randn(1000, 16, dtype=torch.bfloat16) / 4
    labels = torch.randint(1000, (8192,))
    found = linear_cross_entropy(hidden, weight, None, labels, chunk_bytes=64 * 4000)
    assert float(found) == pytest.approx(float(F.cross_entropy(F.linear(hidden, weight).float(), labels)), rel=0.01)


class Block(nn.Module):
    """What a compiler fuses: a norm, a product, a GELU, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(x, labels)


def block_batch(size: int) -> dict[str, Tensor]:
    torch.manual_seed(size)
    return {"x": torch.randn(size, 16, dtype=torch.float64), "labels": torch.randint(16, (size,))}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("recompute", "backend"), [("none", "inductor"), ("full", "inductor"), ("full", "aot_eager")])
def test_compiled_stages_give_the_same_numbers(recompute: str, backend: str):
    torch.manual_seed(0)
    one = Subject(Block().double(), block_batch, None, rows)
    batches = [block_batch(8), block_batch(12)]  # two shapes, two programs
    ours = by_engine(one, batches, 1, 1, 2, methods=[Compiled(backend=backend)], recompute=recompute)
    steps = plainly(Subject(one.model, block_batch, lambda out, batch: out, rows), batches, 2)
    same(ours, steps, 1e-10)


def test_a_file_switches_them_on():
    asked = Settings.model_validate({
        "training": {"steps": 1}, "optimizer": {"flat": True},
        "methods": {"chunked_loss": True, "compile": True, "compress": {"bound": 0.02}, "kfac": {},
                    "central_mask": {"probability": 0.3}, "low_rank": {"rank": 4, "every": 100, "norms": {"a": "b"}}},
    })  # fmt: skip
    found = methods_of(asked.methods)
    names = ["ChunkedLoss", "Compiled", "Compress", "Kfac", "CentralMask", "LowRank"]
    assert [type(m).__name__ for m in found] == names
    assert repr(found[-1]) == "LowRank(rank=4, every=100, layers='.*', energy=False, norms={'a': 'b'})"
    with pytest.raises(ValueError, match="rank"):
        Settings.model_validate({"training": {"steps": 1}, "methods": {"low_rank": {"every": 5}}})
    model = nn.Linear(2, 2)
    assert type(optimizer_factory(model, asked.optimizer)(model.parameters())) is FlatAdamW
    assert not methods_of(Settings.model_validate({"training": {"steps": 1}}).methods)
    with pytest.raises(ValueError, match="way to run adamw"):
        Settings.model_validate({"training": {"steps": 1}, "optimizer": {"name": "sgd", "flat": True}})


class Told(Method):
    """What a method that follows the sum of gradients is told at each step: the step, and the rate."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, float]] = []

    @property
    def seen(self) -> list[tuple[int, float]]:
        return self._seen

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        assert place.optimizer is not None
        groups = place.optimizer.param_groups
        return AfterSum(reducer, lambda: self._seen.append((place.steps(), groups[0]["lr"])))


def test_method_knows_the_step_of_the_job_and_its_rate(tmp_path: Path):
    """A job that goes on from a checkpoint counted from 0 again; K-FAC's bound had the rate of the step before."""

    def job(method: Told) -> Engine:
        torch.manual_seed(0)
        return auto_parallel(
            nn.Linear(4, 4), example=torch.ones(4, 4), hardware="a100-80gb", device="cpu", methods=[method],
            loss_fn=lambda out, batch: (out - batch).square().mean(), rate=lambda step, own: own / (step + 1),
            optimizer=lambda p: torch.optim.SGD(p, 0.5),
        )  # fmt: skip

    first, second = Told(), Told()
    engine = job(first)
    for _ in range(3):
        engine.step(torch.ones(4, 4))
    engine.save(tmp_path)
    again = job(second)
    again.load(tmp_path)
    for one in (engine, again):
        one.step(torch.ones(4, 4))
        one.close()
    assert first.seen == [(step, 0.5 / (step + 1)) for step in range(4)]
    assert second.seen == first.seen[3:]
