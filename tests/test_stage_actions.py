"""F, R, B and W on their own: what is run how often, what is kept, and the same gradients whatever the order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like import trace
from merak_like.runtime.split_backward import ROWS, PutOff, SplitBackward
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stage
from tests.rich import RECOMPUTE, SCHEDULES, rich_plan
from tests.scenarios import PARTS
from tests.training import MODELS, by_engine, engine, gradients, plainly, same, subject

SPLIT = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "linear, then in place": (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True)), (2, 4, 5)),
    "linear of one sample": (lambda: nn.Linear(5, 3), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5)),
    "conv transpose2d": (lambda: nn.ConvTranspose2d(4, 3, (2, 3), padding=1, dilation=(1, 2)), (2, 4, 5, 6)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 5, 4)),
}


class Product(nn.Module):
    """A parameter on the right of ``@``, one in ``addmm``, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.weight)
        x = torch.addmm(self.bias, x, self.weight)
        return F.linear(torch.addmm(self.bias, x, self.weight, beta=0.5), self.weight)


SPLIT["products"] = (Product, (4, 5))


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)


@pytest.mark.parametrize("name", SPLIT)
def test_split_backward_gives_the_gradients_of_the_whole_one(name: str) -> None:
    build, shape = SPLIT[name]
    torch.manual_seed(0)
    module, x = build().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    call(module, x).square().sum().backward()
    whole = gradients(module)
    inputs, x.grad = x.grad, None
    module.zero_grad()
    pending = Counter[int]()
    later = PutOff(pending)
    with SplitBackward(later):
        out = call(module, x)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, inputs, rtol=1e-12, atol=1e-12)
    waits = [n for n, p in module.named_parameters() if pending[id(p)]]
    for n in waits:
        p = module.get_parameter(n)
        assert p.grad is None or not torch.allclose(p.grad, whole[n]), n
    assert waits or name in ("attention", "linear of one sample", "conv2d same")
    later.run()
    assert not any(pending.values())
    for n, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, whole[n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_waits_for_its_w(padding: int | None, by_frequency: bool) -> None:
    table = nn.Embedding(6, 3, padding_idx=padding, scale_grad_by_freq=by_frequency).double()
    ids = torch.tensor([[0, 1, 1], [5, 2, 1]])
    table(ids).square().sum().backward()
    whole = gradients(table)
    table.zero_grad()
    later = PutOff(Counter())
    with SplitBackward(later):
        out = table(ids).square().sum()
    out.backward()
    assert table.weight.grad is None
    later.run()
    torch.testing.assert_close(gradients(table)["weight"], whole["weight"])


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}])
def test_embedding_that_cannot_wait_is_left_alone(options: dict[str, Any]) -> None:
    table = nn.Embedding(6, 3, **options)
    with SplitBackward(PutOff(Counter())):
        out = table(torch.tensor([1, 2])).sum()
    out.backward()
    assert table.weight.grad is not None


def test_frozen_weights_do_not_wait() -> None:
    layer = nn.Linear(3, 3).requires_grad_(False)
    pending = Counter[int]()
    with SplitBackward(PutOff(pending)):
        out = layer(torch.ones(2, 3, requires_grad=True))
    out.sum().backward()
    assert not pending


def test_hooks_of_a_parameter_run_once_and_may_change_the_gradient() -> None:
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    calls: list[str] = []

    def halve(gradient: Tensor) -> Tensor:
        calls.append("hook")
        return gradient / 2

    layer.weight.register_hook(halve)
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append("after"))
    (layer(x) + layer(2 * x)).square().sum().backward()
    whole = gradients(layer)
    layer.zero_grad()
    calls.clear()
    later = PutOff(Counter())
    with SplitBackward(later):
        out = (layer(x) + layer(2 * x)).square().sum()
    out.backward()
    assert "after" not in calls
    calls.clear()
    later.run()
    assert calls == ["hook", "after"]
    torch.testing.assert_close(gradients(layer), whole)


def test_split_backward_under_autocast_is_that_of_autocast() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)

    def run(later: PutOff | None) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if later is None:
                out = model(x)
            else:
                with SplitBackward(later):
                    out = model(x)
            assert out.dtype == torch.bfloat16
            out.float().square().sum().backward()
        if later is not None:
            later.run()
        return gradients(model)

    whole, split = run(None), run(PutOff(Counter()))
    for name, gradient in split.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, whole[name], rtol=2e-2, atol=2e-2)


def test_rows_can_be_added_from_outside() -> None:
    assert F.linear in ROWS
    assert isinstance(SplitBackward(PutOff(Counter())), TorchFunctionMode)


# --- whole stages ------------------------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    """Counts calls of functions of two factors and more: what a recompute must not do twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_modules(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module without children ran."""
    calls = Counter[str]()
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("recompute", [*RECOMPUTE])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_those_without_recompute(name: str, recompute: str, put_off: bool) -> None:
    """Dropout is on: the second run must draw the numbers of the first, and leave the generator alone."""
    one = subject(name)
    batch = one.batch(2)
    traced = trace(one.model, batch, one.loss_fn)
    plan = rich_plan(one, batch, 1, 1, 1, "1f1b", recompute)
    ranges = ranges_of(plan, traced)
    buffers = {key: value.clone() for key, value in one.model.named_buffers()}
    found: list[dict[str, Tensor]] = []
    for again in ((), ranges):
        for key, value in one.model.named_buffers():
            value.copy_(buffers[key])
        one.model.zero_grad()
        stage = Stage(build_stage(traced, one.model, plan.starts, 0, again), traced.inputs, torch.device("cpu"))
        torch.manual_seed(1)
        with counted_modules(one.model) as calls:
            made = stage.forward(0, batch, {}, put_off=put_off)
            before = Counter(calls)
            drawn = torch.get_rng_state()
            if again:
                stage.recompute(0)
            once = Counter(calls)
            stage.recompute(0)
            stage.backward(0, {"loss": torch.ones_like(made["loss"])})
            assert calls == once, "the backward ran something again that was there"
        assert torch.equal(drawn, torch.get_rng_state())
        assert (once == before) == (not again)
        assert all(once[key] <= 2 * count for key, count in before.items())
        if recompute == "full":
            assert not again or once == Counter({key: 2 * count for key, count in before.items()})
        if put_off:
            stage.weight(0)
        state = {f"buffer {key}": value.clone() for key, value in one.model.named_buffers()}
        found.append(gradients(one.model) | state)
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert [key for key in plain if not torch.equal(plain[key], recomputed[key])] == []


class FromNothing(nn.Module):
    """Its first product reads no input at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.tanh(self.a @ self.b)
        return torch.sigmoid(made @ x)


def test_piece_without_inputs_is_run_again() -> None:
    torch.manual_seed(0)
    model, x = FromNothing(), torch.randn(4, 4)
    traced = trace(model, x, lambda out, batch: out.sum())
    names = [op.name for op in traced.graph.ops]
    again = [(0, names.index("tanh") + 1)] if names.index("tanh") < names.index("sigmoid") else []
    found = []
    for ranges in ((), again):
        model.zero_grad()
        stage = Stage(build_stage(traced, model, (0, len(names)), 0, ranges), traced.inputs, torch.device("cpu"))
        made = stage.forward(0, x, {})
        stage.backward(0, {"loss": torch.ones_like(made["loss"])})
        found.append(gradients(model))
    assert again
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("a", "b"))


def test_piece_that_does_something_else_the_second_time_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    traced = trace(model, x, lambda out, batch: out.sum())
    size = len(traced.graph.ops)
    stage = Stage(build_stage(traced, model, (0, size), 0, [(0, size)]), traced.inputs, torch.device("cpu"))
    stage.forward(0, x, {})
    model[2].weight.requires_grad_(False)
    model[2].forward = lambda x: x.exp().log()  # type: ignore[method-assign]
    with pytest.raises(
        RuntimeError, match=r"ops .* to .* kept \d+ tensors .* and \d+ when it was run again, .* do not rec"
    ):
        stage.recompute(0)


def ranges_of(plan: Any, traced: Any) -> tuple[tuple[int, int], ...]:
    from merak_like.partitioner.realign import recomputed_ranges

    return recomputed_ranges(plan, 0, traced.graph, traced.graph)


@pytest.mark.parametrize("recompute", [*RECOMPUTE])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_process_runs_every_schedule(schedule: str, recompute: str) -> None:
    """All stages on one rank: values and gradients are handed over without a link."""
    one = subject("gpt2")
    batches = [one.batch(11)] * 2
    plan = rich_plan(one, batches[0], 1, 1, PARTS // 2, schedule, recompute, chunks=3)
    ours = by_engine(one, batches, 1, 1, PARTS // 2, plan=plan)
    assert same(ours, plainly(one, batches, PARTS // 2), 1e-10) <= 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recompute_runs_everything_exactly_twice(schedule: str) -> None:
    one = subject("llama")
    batch = one.batch(4)
    plan = rich_plan(one, batch, 1, 1, 4, schedule, "full")
    ours = engine(one, batch, 1, 1, 4, plan=plan)
    ours.step(batch)  # another trace is made where a micro-batch has no padding
    with counted_modules(ours.model) as calls:
        ours.step(batch)
    ours.close()
    called = {name: count for name, count in calls.items() if count}
    assert len(called) > 10
    shared = {"model.rotary_emb"}  # computed once for all layers
    assert {count for name, count in called.items() if name not in shared} == {2 * 4}
