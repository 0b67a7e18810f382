"""What may be in a batch, what the model may ask of it, and what is said when tracing cannot go on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merak_like.partitioner.tracer import TraceError, trace
from merak_like.partitioner.tracer.guards import GuardError
from merak_like.runtime.local import LocalPipeline
from tests.zoo.hugging_face import CASES
from tests.zoo.plain import TOYS
from tests.zoo.staged import even_starts

WIDTH = 8


class Flexible(nn.Module):
    """One weight and whatever forward the test wants."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.tail = nn.Linear(WIDTH, WIDTH)
        self.forward = forward.__get__(self)


def square(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().mean()


def agrees(model: nn.Module, batch: Any, loss_fn: Any, expected: Tensor) -> tuple[str, ...]:
    """The pipeline's loss is the expected one; the names of the inputs."""
    recorded = trace(model, batch, loss_fn)
    pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
    assert torch.equal(pipeline.step(batch)["loss"], expected.detach())
    return tuple(recorded.inputs)


# --------------------------------------------------------------------------------------------------------- batch forms
def test_a_tensor() -> None:
    model, x = Flexible(lambda self, x: self.tail(self.linear(x))), torch.randn(2, WIDTH)
    assert agrees(model, x, square, square(model(x), x)) == ("batch",)


def test_a_tuple_of_inputs_and_a_target() -> None:
    model = Flexible(lambda self, x: self.tail(self.linear(x)))
    batch = (torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    expected = (model(batch[0]) - batch[1]).square().mean()
    assert agrees(model, batch, lambda out, b: (out - b[1]).square().mean(), expected) == ("batch_0", "batch_1")


def test_a_named_tuple_is_one_argument() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    model = Flexible(lambda self, pair: self.tail(self.linear(pair.left)) + pair.right)
    batch = Pair(torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    assert len(agrees(model, batch, square, square(model(batch), batch))) == 2


def test_a_dict_with_nested_tensors_numbers_strings_and_none() -> None:
    def forward(
        self: Any, x: Tensor, more: dict[str, Any], scale: float, mode: str, mask: Tensor | None = None
    ) -> Tensor:
        assert mask is None
        assert mode == "add"
        return self.tail(self.linear(x) * scale + more["list"][1] + more["deep"]["x"])

    model, one = Flexible(forward), torch.randn(2, WIDTH)
    batch = {"x": one, "more": {"list": [3, one * 2], "deep": {"x": one}}, "scale": 0.5, "mode": "add", "mask": None}
    agrees(model, batch, square, square(model(**batch), batch))


def test_a_tensor_named_twice_is_two_inputs() -> None:
    """It was one, so that a batch with two tensors there had the second left unread."""
    model, x = Flexible(lambda self, a, b: self.tail(self.linear(a) + b)), torch.randn(2, WIDTH)
    recorded, other = trace(model, {"a": x, "b": x}, square), {"a": x, "b": torch.randn(2, WIDTH)}
    assert [op.kind for op in recorded.graph.ops].count("input") == 2
    made = LocalPipeline(recorded, model, even_starts(recorded.graph, 2)).step(other)
    assert torch.equal(made["loss"], square(model(**other), other).detach())


def test_the_loss_function_may_use_what_forward_does_not_take() -> None:
    model, x = Flexible(lambda self, x: self.tail(self.linear(x))), torch.randn(2, WIDTH)
    batch = {"x": x, "weight": torch.rand(2, 1)}
    expected = (model(x) * batch["weight"]).sum()
    assert agrees(model, batch, lambda out, b: (out * b["weight"]).sum(), expected) == ("x", "weight")


def test_the_outputs_keep_their_names() -> None:
    recorded = trace(CASES["gpt2"].build(), CASES["gpt2"].batch())
    assert list(recorded.graph.outputs) == ["loss", "logits"]


# -------------------------------------------------------------------------------------------------------------- guards
def test_a_batch_that_takes_another_branch_is_told_so() -> None:
    toy = TOYS["branch_on_input"]
    model, batch = toy.build(), toy.batch()
    recorded = trace(model, batch, toy.loss_fn)
    pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
    pipeline.step(batch)
    with pytest.raises(GuardError, match=r"bool\(\) == False, this batch has True.*trace again with this batch"):
        pipeline.step(batch | {"mask": torch.ones_like(batch["mask"])})


def test_a_batch_with_another_number_of_true_places_is_told_so() -> None:
    toy = TOYS["mask_indexing"]
    model, batch = toy.build(), toy.batch()
    recorded = trace(model, batch, toy.loss_fn)
    pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
    pipeline.step(batch)
    with pytest.raises(GuardError, match=r"gave a result of shape \(20, 16\), this batch gives \(24, 16\)"):
        pipeline.step(batch | {"mask": torch.ones_like(batch["mask"])})


def test_a_buffer_may_be_asked_as_long_as_nothing_changes_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.tail(self.linear(x)) * int(self.steps)

    model = Flexible(forward)
    model.register_buffer("steps", torch.tensor(3))
    x = torch.randn(2, WIDTH)
    recorded = trace(model, x, square)
    pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
    assert torch.equal(pipeline.step(x)["loss"], square(model(x), x).detach())
    model.get_buffer("steps").fill_(4)
    with pytest.raises(GuardError, match="== 3, this batch has 4"):
        pipeline.step(x)


# ------------------------------------------------------------------------------------- modules that look at their data
class Experts(nn.Module):
    """Sends each row to the expert its largest element names; loops over those that were chosen."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = x.argmax(-1) % len(self.each), torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, self.each[number](x[rows]))
        return out


class Mixture(nn.Module):
    def __init__(self, inner: type[nn.Module] = Experts) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), inner(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x)))


def test_an_expert_loop_is_one_op_and_chooses_anew_for_every_batch() -> None:
    torch.manual_seed(0)
    model = Mixture()
    random = torch.get_rng_state()
    recorded = trace(model, torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1)), square)
    assert torch.equal(torch.get_rng_state(), random)
    op = next(op for op in recorded.graph.ops if op.target == "experts")
    assert (op.kind, len(op.params)) == ("module", 6)
    assert op.flops > 2 * 6 * WIDTH * WIDTH
    assert op.saved_bytes > 0
    for seed in range(3):
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
        pipeline = LocalPipeline(recorded, model, even_starts(recorded.graph, 2))
        assert torch.equal(pipeline.step(x)["loss"], square(model(x), x).detach())


def test_it_needs_no_weights_either() -> None:
    with torch.device("meta"):
        model = Mixture()
    graph = trace(model, torch.zeros(6, WIDTH), square).graph
    assert all(p.device.type == "meta" for p in model.parameters())
    assert any(op.target == "experts" for op in graph.ops)


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.sum(-1) > 0).nonzero()[:, 0]
        return self.linear(x[rows])


def test_a_result_whose_size_depends_on_an_activation_is_refused() -> None:
    with pytest.raises(TraceError, match="experts looks at its data, and the shape of its results depends on it"):
        trace(Mixture(Positive), torch.randn(64, WIDTH), square)


# -------------------------------------------------------------------------------------------------------- named errors
def test_no_labels() -> None:
    batch = CASES["gpt2"].batch()
    del batch["labels"]
    with pytest.raises(TraceError, match=r"GPT2LMHeadModel should give a scalar loss, .*put labels into the example"):
        trace(CASES["gpt2"].build(), batch)


def test_an_unknown_keyword() -> None:
    model = Flexible(lambda self, x: self.linear(x).mean())
    with pytest.raises(TraceError, match=r"Flexible.forward has no arguments \['y'\] \(it takes \['x'\]\)"):
        trace(model, {"x": torch.ones(2, WIDTH), "y": torch.ones(2)})


def test_a_loss_that_is_no_scalar() -> None:
    model, x = Flexible(lambda self, x: self.linear(x)), torch.ones(2, WIDTH)
    with pytest.raises(TraceError, match=r"loss_fn must give a scalar tensor, found torch\.Size"):
        trace(model, x, lambda out, batch: out)
    with pytest.raises(TraceError, match=r"should give a scalar loss, found a tensor of shape \(2, 8\)"):
        trace(model, x)


def test_layer_drop_is_a_branch_on_chance() -> None:
    model: Any = CASES["opt"].build()
    model.model.decoder.layerdrop = 0.5
    with pytest.raises(TraceError, match=r"depends on random numbers \(layer drop\? set its probability to 0\)"):
        trace(model, CASES["opt"].batch())


def test_numbers_that_python_draws_would_be_frozen() -> None:
    model = Flexible(lambda self, x: self.tail(self.linear(x) * float(np.random.rand())))
    state = np.random.get_state(legacy=False)
    with pytest.raises(TraceError, match="draws random numbers from Python's random or from numpy"):
        trace(model, torch.ones(2, WIDTH), square)
    assert str(state) == str(np.random.get_state(legacy=False))
    unread = Flexible(lambda self, x: self.tail(self.linear(x)) if np.random.rand() < 2 else x)
    trace(unread, torch.ones(2, WIDTH), square)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(TraceError, match="leave that context"):
        trace(Flexible(lambda self, x: self.linear(x)), torch.ones(2, WIDTH), square)


def test_weights_converted_in_forward() -> None:
    x = torch.ones(2, WIDTH)
    agrees(same := Flexible(lambda self, x: self.tail.float()(self.linear(x))), x, square, square(same(x), x))
    with pytest.raises(TraceError, match="converts the weights of a module in its forward"):
        trace(Flexible(lambda self, x: self.tail.double()(self.linear(x).double())), x, square)
