"""What the ranks do in the tests of ZeRO and precision, against plain PyTorch in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import auto_parallel
from merak_like.runtime import flat
from merak_like.runtime.batches import split
from merak_like.runtime.precision import Precision
from tests import scenarios, training
from tests.scenarios import PARTS, SAMPLES, leads
from tests.training import LIMIT, Step, Subject, Trained, adamw, by_engine, engine, plain_step, same, subject

STEPS = 3


@lru_cache(maxsize=4)
def reference(name: str) -> tuple[Subject, list[Any], Trained | None]:
    """A model with dropout and ties, or one with frozen and unused layers; clipped, in float64."""
    one = scenarios.patchy() if name == "patchy" else subject(name)
    batches = [one.batch(SAMPLES)] * STEPS
    return one, batches, training.plainly(one, batches, PARTS) if leads() else None


def spread(name: str, dp: int, pp: int, zero: int, schedule: str = "1f1b", bucket: int = 2000) -> float:
    """One cell of the matrix. Small buckets: weights lie across the ranks' runs, and the last run has fewer."""
    one, batches, plain = reference(name)
    before, flat.SPREAD_BYTES = flat.SPREAD_BYTES, bucket
    try:
        ours = by_engine(one, batches, dp, pp, PARTS // dp, zero=zero, schedule=schedule)
    finally:
        flat.SPREAD_BYTES = before
    return 0.0 if plain is None else same(ours, plain, 1e-10)


def deepspeed(name: str, dp: int, pp: int, backend: str, tp: int = 1, adam: str = "adamw", **more: Any) -> float:
    """DeepSpeed's ZeRO-1 against plain training, in float32, with two groups of weights."""
    from merak_like.runtime.deepspeed_zero import cpu_adam

    make = cpu_adam if adam == "cpu_adam" else torch.optim.AdamW
    one, batches, plain = grouped(name)
    settings = {"zero": 1, "zero_backend": backend, "optimizer": partial(decaying, make), "tp": tp} | more
    ours = by_engine(one, batches, dp, pp, PARTS // dp, **settings)
    return 0.0 if plain is None else same(ours, plain, 1e-5)


def decaying(make: Any, parameters: Any) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "lr": 2e-3},
    ]
    return make([group for group in groups if group["params"]], lr=1e-3, weight_decay=0.0)


@lru_cache(maxsize=4)
def grouped(name: str) -> tuple[Subject, list[Any], Trained | None]:
    """A model in float32 and plain training of it."""
    one = training.in_one_precision(name, dtype=torch.float32)
    batches = [one.batch(SAMPLES)] * STEPS
    if not leads():
        return one, batches, None
    usual, training.adamw = training.adamw, partial(decaying, torch.optim.AdamW)
    try:
        return one, batches, training.plainly(one, batches, PARTS)
    finally:
        training.adamw = usual


def as_much_as_said(dp: int, pp: int, zero: int) -> list[int]:
    """Numbers that the optimizer and the gradients take on this rank, and those of its stage's weights."""
    one = subject("gpt2")
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, zero=zero)
    ours.step(one.batch(SAMPLES))
    assert ours.optimizer is not None
    moments = sum(s["exp_avg"].numel() for s in ours.optimizer.state.values())
    reducer: Any = ours._reducer
    parts: list[Any] = [getattr(p, "to_local", lambda p=p: p)() for p in ours._parameters.values()]
    weights, whole = (sum(each.numel() for each in some) for some in (parts, ours._parameters.values()))
    if zero == 3:
        gradients: list[Any] = [p.grad for p in ours._parameters.values() if p.grad is not None]
        kept = sum(gradient.to_local().numel() for gradient in gradients)
    else:
        kept = sum((b.own if b.sums is None else b.sums).numel() for b in reducer.buckets)
    planned = [stage.memory for stage in ours.plan.stages]
    ours.close()
    assert sum(one.optimizer for one in planned) == pytest.approx(2 * 8 * moments, rel=0.02)
    assert sum(one.gradients for one in planned) == pytest.approx(8 * kept, rel=0.02)
    assert sum(one.weights for one in planned) == pytest.approx(8 * weights, rel=0.02)
    return [moments, kept, whole]


class Rounded:
    """Plain training in low precision: a model that computes, weights that learn, gradients summed in float32."""

    def __init__(self, one: Subject, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.one, self.scale = one, scale
        self.model = copy.deepcopy(one.model)
        self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.model.named_parameters()}
        self.model.to(dtype)
        self.optimizer = adamw(self.masters.values())

    def step(self, parts: list[Any], number: int) -> Step:
        """Sum, clip, update, round."""
        sums = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        parameters = dict(self.model.named_parameters())

        def take(name: str) -> Callable[[Any], None]:
            def hook(p: Any) -> None:
                sums[name] += p.grad
                p.grad = None

            return hook

        hooks = [p.register_post_accumulate_grad_hook(take(n)) for n, p in parameters.items()]
        loss, total = plain_step(self._scaled(), self.model, parts, number)
        for hook in hooks:
            hook.remove()
        for name, master in self.masters.items():
            master.grad = sums[name] / self.scale
        norm = nn.utils.clip_grad_norm_(self.masters.values(), LIMIT).item()
        self.optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.masters[name])
        return Step(loss / self.scale, norm, total, {n: m.grad for n, m in self.masters.items() if m.grad is not None})

    def _scaled(self) -> Any:
        one, scale = self.one, self.scale

        class Scaled:
            weight = staticmethod(one.weight)

            @staticmethod
            def loss(model: nn.Module, batch: Any) -> torch.Tensor:
                return one.loss(model, batch) * scale

        return Scaled


TOLERANCE = {"bf16": 4e-2, "fp16": 4e-3}
"""Of the largest gradient: 8 and 11 bits of a number, and dropout's own choices are the same."""


@lru_cache(maxsize=2)
def rounded(name: str, precision: str) -> tuple[Subject, list[Any], Trained | None]:
    """Some steps of plain training in low precision."""
    one = subject(name, dtype=torch.float32)
    batches = [one.batch(SAMPLES)] * STEPS
    if not leads():
        return one, batches, None
    plain = Rounded(
        one, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], 2.0**16 if precision == "fp16" else 1
    )
    steps = [plain.step(split(batch, PARTS), number) for number, batch in enumerate(batches)]
    return one, batches, Trained(steps, {n: m.detach() for n, m in plain.masters.items()})


def in_precision(name: str, dp: int, pp: int, precision: str, zero: int, **more: Any) -> float:
    """Losses, gradients and the weights that learn; and that anything was rounded at all."""
    one, batches, plain = rounded(name, precision)
    ours = by_engine(one, batches, dp, pp, PARTS // dp, precision=precision, zero=zero, **more)
    # fully_shard keeps float32 weights and casts them where they are used, which only the numbers show
    exact = by_engine(one, batches[:1], dp, pp, PARTS // dp, zero=zero).steps[0].loss if zero == 3 else None
    if plain is None:
        return 0.0
    kinds = {v.dtype for v in ours.weights.values()}
    stored = torch.float32 if zero == 3 else torch.bfloat16 if precision == "bf16" else torch.float16
    assert kinds == {stored}, kinds
    assert exact is None or abs(exact - ours.steps[0].loss) > 1e-6, "nothing was computed in low precision"
    found = []
    for a, b in zip(ours.steps, plain.steps, strict=True):
        assert all(g.dtype == torch.float32 for g in a.gradients.values())
        assert abs(a.loss - b.loss) <= TOLERANCE[precision] * b.loss
        assert abs(a.norm - b.norm) <= TOLERANCE[precision] * b.norm
        largest = max(g.abs().max().item() for g in b.gradients.values())
        for key, gradient in b.gradients.items():
            found.append((a.gradients[key] - gradient).abs().max().item() / largest)
    assert max(found) <= TOLERANCE[precision], max(found)
    return max(found)


def overflowing(dp: int, pp: int, zero: int) -> list[Any]:
    """A loss scale that is far too large: all ranks skip and halve it together, then train."""
    one = subject("llama", dtype=torch.float32)
    precise = Precision(torch.float16, loss_scale=2.0**30)
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, precision=precise, zero=zero)
    before = {k: p.detach().clone() for k, p in ours._parameters.items()}
    said: list[Any] = []
    for _ in range(30):
        result = ours.step(one.batch(SAMPLES))
        unchanged = all(torch.equal(p, before[k]) for k, p in ours._parameters.items())
        assert unchanged == result.skipped
        said.append((result.skipped, ours._update.guard.scale))
        if not result.skipped:
            break
    ours.close()
    assert 2 < len(said) < 30
    return said


def skipping(dp: int, pp: int) -> list[str]:
    """A batch with a NaN in one sample: skipped twice, refused the third time with where it began."""
    from tests.faults import items, small

    ours = small(dp, pp, skip_not_finite=2)
    good, bad = items(16), items(16)
    bad["x"][9] = float("nan")
    ours.step(good)
    before = {k: p.detach().clone() for k, p in ours._parameters.items()}
    results = [ours.step(bad) for _ in range(2)]
    unchanged = all(torch.equal(p, before[k]) for k, p in ours._parameters.items())
    said: list[str] = []
    for batch, spoil in ((bad, ""), (good, "layers.5"), (good, "gradient")):
        hook: Any = None
        ours._update.guard.skipped = 2
        if spoil == "gradient" and "layers.2.weight" in ours._parameters:
            hook = ours._parameters["layers.2.weight"].register_hook(lambda grad: grad * float("inf"))
        elif spoil == "layers.5" and "layers.5.weight" in ours._parameters:
            layer = ours.model.get_submodule(spoil)
            worse: Any = lambda module, args, out: out * float("inf")  # noqa: E731
            hook = layer.register_forward_hook(worse)
        try:
            ours.step(batch)
        except FloatingPointError as error:
            said.append(str(error))
        if hook is not None:
            hook.remove()
    fine = ours.step(good)
    ours.close()
    assert [r.skipped for r in results] == [True, True]
    assert unchanged
    assert not fine.skipped
    return said


def gathered(family: str, dp: int, pp: int) -> float:
    """A second step of ZeRO-3, all that the allocator gives and takes: the plan's bytes to it.

    Weights and the optimizer's state are there before, gradients are not.
    """
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.planner.random_rows import MODELS, SEQ

    ids = torch.randint(0, 2048, (8 * dp, SEQ), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    ours = auto_parallel(
        MODELS[family](6, 256), dp, pp, example=batch, micro_batches=2, zero=3, optimizer=adamw, device="cpu",
        timeout=100.0,
    )  # fmt: skip
    ours.step(batch)
    ours._clear_gradients()  # pyright: ignore[reportPrivateUsage]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        ours.step(batch)
    profiler: Any = watched.profiler
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = ours.plan.memory_bytes[0]
    ours.close()
    before = held["weights"] + held["optimizer"]
    return held["total"] / (before + max(accumulate(change for _, change in changes)))
