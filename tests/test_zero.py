"""Optimizer state and gradients spread over replicas, and low precision: the numbers of one process all the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import auto_parallel
from merak_like.runtime.zero import ELEMENTWISE
from tests import spread
from tests.ranks import Call, results_of, selected_calls
from tests.test_checkpoints import call as lasting_call
from tests.test_checkpoints import here

ranks = [pytest.mark.ranks, pytest.mark.timeout(400)]


def call(function: str, dp: int, pp: int, **more: Any) -> Call:
    """A function of tests.spread."""
    words = [function, *(str(v) for v in more.values()), f"{dp}x{pp}"]
    return Call("-".join(words), f"tests.spread:{function}", {"dp": dp, "pp": pp, **more})


SPREAD = [
    call("spread", 2, 2, name="gpt2", zero=2),
    call("spread", 4, 1, name="patchy", zero=2),
]
MORE = [
    call("spread", 4, 1, name="gpt2", zero=1),
    call("spread", 2, 2, name="patchy", zero=1),
    call("spread", 2, 2, name="gpt2", zero=2, schedule="zb-v"),
    call("spread", 2, 2, name="gpt2", zero=1),
    call("spread", 4, 1, name="gpt2", zero=2),
    call("spread", 2, 2, name="patchy", zero=2),
    call("spread", 4, 1, name="patchy", zero=1),
    call("spread", 1, 4, name="gpt2", zero=2),  # nothing but the tie has replicas
    call("spread", 2, 2, name="t5", zero=1, schedule="interleaved"),
    call("spread", 2, 2, name="llama", zero=2, schedule="zb-h1", bucket=10**6),
    call("spread", 4, 1, name="vit", zero=1),
]
PRECISION = [
    call("in_precision", 2, 2, name="gpt2", precision="bf16", zero=1),
    call("in_precision", 1, 2, name="llama", precision="bf16", zero=0, tp=2),
]
MORE_PRECISION = [
    call("in_precision", 2, 2, name="llama", precision="bf16", zero=0),
    call("in_precision", 4, 1, name="gpt2", precision="bf16", zero=2),
    call("in_precision", 2, 2, name="llama", precision="fp16", zero=2),
]
SHARDED = [
    Call("sharded-falcon-1-2x1x2", "tests.sharded:spread", {"name": "falcon", "dp": 2, "pp": 1, "tp": 2, "zero": 1})
]
MORE_SHARDED = [
    Call(f"sharded-{name}-{zero}-{rows}-2x1x2", "tests.sharded:spread",
         {"name": name, "dp": 2, "pp": 1, "tp": 2, "zero": zero, "sequence_parallel": rows})
    for name, zero, rows in (("llama", 1, False), ("falcon", 2, False), ("llama", 1, True), ("t5", 2, True))
]  # fmt: skip
WEIGHTS = [
    call("spread", 2, 1, name="gpt2", zero=3),
    call("spread", 4, 1, name="patchy", zero=3),
    call("spread", 2, 1, name="llama", zero=3),
    call("in_precision", 2, 1, name="gpt2", precision="bf16", zero=3),
]
MUCH = [call("as_much_as_said", 4, 1, zero=zero) for zero in (1, 2, 3)]
GATHERED = [call("gathered", 2, 1, family=family) for family in ("gpt2", "llama")]
OVERFLOW = call("overflowing", 2, 2, zero=1)
SKIPPING = call("skipping", 2, 2)
SAVING = [
    lasting_call("unbroken", 2, 2, "zero1", name="gpt2", zero=1),
    lasting_call("unbroken", 4, 1, "rows", name="gpt2", zero=3),
    lasting_call("unbroken", 2, 1, "both", name="gpt2", zero=1, tp=2),
    lasting_call("unbroken", 4, 1, "bf16", name="gpt2", zero=2, precision="bf16"),
]
GOING_ON = [lasting_call("go_on", 2, 2, "zero1", name="gpt2", exact=True, zero=1)]
MORE_GOING_ON = [
    lasting_call("go_on", 4, 1, "zero1", name="gpt2", exact=False, zero=2),
    lasting_call("go_on", 4, 1, "rows", name="gpt2", exact=True, zero=3),
    lasting_call("go_on", 2, 2, "rows", name="gpt2", exact=False, zero=1),
    lasting_call("go_on", 2, 1, "both", name="gpt2", exact=True, zero=1, tp=2),
    lasting_call("go_on", 4, 1, "both", name="gpt2", exact=False, zero=2),
    lasting_call("go_on", 1, 4, "zero1", name="gpt2", exact=False),
    lasting_call("go_on", 4, 1, "bf16", name="gpt2", exact=True, zero=2, precision="bf16"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(root: Path, request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank, in one job of four."""
    selected = [one for one in selected_calls(request) if one not in SAVING]
    saving = [one for one in SAVING if any(g.arguments.get("folder") == one.arguments["folder"] for g in selected)]
    found = results_of([here(one, root) if "folder" in one.arguments else one for one in (*saving, *selected)])
    return lambda one: found(here(one, root) if "folder" in one.arguments else one)


def of(cases: list[Call], slow: Sequence[Call] = ()) -> Any:
    """A test for each call."""
    more = [pytest.param(c, id=c.name, marks=[*ranks, pytest.mark.slow]) for c in slow]
    return pytest.mark.parametrize("case", [*(pytest.param(c, id=c.name, marks=ranks) for c in cases), *more])


@of(SPREAD, MORE)
def test_spread_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@of([], WEIGHTS)
def test_spread_weights_too(case: Call, results: Callable[[Call], list[Any]]) -> None:
    precision = case.arguments.get("precision")
    assert max(results(case)) <= (spread.TOLERANCE[precision] if precision else 1e-10)


@of([], GATHERED)
def test_weights_that_are_gathered_are_in_the_plan(case: Call, results: Callable[[Call], list[Any]]) -> None:
    """Never under by more than 2 %; over by what a block's backward no longer holds."""
    assert 0.98 <= min(results(case)) <= max(results(case)) <= 1.06


@of(SHARDED, MORE_SHARDED)
def test_replicas_of_sharded_weights_spread_their_shards(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@of(PRECISION, MORE_PRECISION)
def test_low_precision_is_that_of_one_process(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= spread.TOLERANCE[case.arguments["precision"]]


@of(MUCH)
def test_each_rank_keeps_its_share_and_no_more(case: Call, results: Callable[[Call], list[Any]]) -> None:
    said = results(case)
    weights = said[0][2]
    assert sum(moments for moments, _, _ in said) == weights, "every number has one owner"
    for moments, kept, _ in said:
        assert moments <= -(-weights // 4) + 4
        assert kept <= (weights if case.arguments["zero"] == 1 else -(-weights // 4)) + 4


@pytest.mark.parametrize("case", [pytest.param(OVERFLOW, marks=ranks)])
def test_all_ranks_have_one_loss_scale(case: Call, results: Callable[[Call], list[Any]]) -> None:
    said = results(case)
    assert said == [said[0]] * 4
    scales = [scale for _, scale in said[0]]
    assert scales[:3] == [2.0**29, 2.0**28, 2.0**27]
    assert [skipped for skipped, _ in said[0]] == [True] * (len(scales) - 1) + [False]


@pytest.mark.parametrize("case", [pytest.param(SKIPPING, marks=ranks)])
def test_bad_step_is_skipped_then_refused_with_where_it_began(case: Call, results: Callable[[Call], list[Any]]) -> None:
    expected = (
        r"^step 3: the loss is nan .* after 2 skipped steps in a row; in micro-batches \[2\] \(micro-batch 2: first in "
        r"the batch itself of stage 0\); the weights are as they were before the step$",
        r"in micro-batches \[0, 1, 2, 3\] \(micro-batch 0: first in layers.5 \(Linear\) of stage \d; micro-batch 1:",
        r"the forward of every micro-batch is finite, the backward is not, .* gradient of layers.2.weight of stage 0",
    )
    for said in results(case):
        assert len(said) == 3
        for pattern, text in zip(expected, said, strict=True):
            assert re.search(pattern, text), text


@of(GOING_ON, MORE_GOING_ON)
def test_spread_job_goes_on_in_any_layout(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


# ------------------------------------------------------------------------------------------------------- in one process


def build(**more: Any) -> Any:
    """An engine of one process."""
    settings: dict[str, Any] = {"optimizer": torch.optim.AdamW, "device": "cpu", "hardware": "a100-80gb"} | more
    example, model = torch.ones(4, 4), nn.Linear(4, 4)
    nn.init.ones_(model.weight)
    return auto_parallel(model, example=example, loss_fn=lambda outputs, batch: outputs.float().mean(), **settings)


def test_optimizer_that_looks_at_whole_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="zero=1 gives each rank runs of numbers, and Adafactor may look at whole"):
        build(optimizer=torch.optim.Adafactor, zero=1)

    class Mine(torch.optim.SGD):
        """Of one's own."""

    with pytest.raises(ValueError, match="and Mine may look at whole weights"):
        build(optimizer=Mine, zero=2)
    Mine.elementwise = True  # type: ignore[attr-defined]
    build(optimizer=Mine, zero=2).close()


def test_unknown_levels_and_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zero=4: it is 0, 1 \(spread the optimizer's state\), 2"):
        build(zero=4)
    with pytest.raises(ValueError, match="precision='int8' is none of bf16, fp16"):
        build(precision="int8")


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_optimizers_said_to_treat_each_number_for_itself_do(name: str) -> None:
    """The same numbers in one tensor, or cut into two flat ones."""
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    whole = nn.Parameter(start.clone())
    cut = [nn.Parameter(part.clone()) for part in (start.flatten()[:5], start.flatten()[5:])]
    options: dict[str, Any] = {} if name == "Rprop" else {"weight_decay": 0.1}
    optimizers = [getattr(torch.optim, name)(of, lr=0.01, **options) for of in ([whole], cut)]
    for gradient in gradients:
        whole.grad = gradient.clone()
        cut[0].grad, cut[1].grad = gradient.flatten()[:5].clone(), gradient.flatten()[5:].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([c.detach() for c in cut]), whole.detach().flatten())


def test_plan_knows_what_low_precision_keeps() -> None:
    def kept(**more: Any) -> tuple[int, int, int]:
        engine = build(**more)
        memory = engine.plan.stages[0].memory
        engine.close()
        return memory.weights, memory.gradients, memory.optimizer

    assert kept() == (4 * 20, 4 * 20, 8 * 20)
    assert kept(precision="bf16") == (2 * 20, 4 * 20, 12 * 20), "with weights and moments in float32"


def test_weights_learn_what_is_too_small_for_the_numbers_they_compute_with() -> None:
    engine = build(precision="bf16", optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    before = engine.model.weight.detach().clone()
    for _ in range(3):
        engine.step(torch.ones(4, 4))
    assert engine.model.weight.dtype == torch.bfloat16
    (master,) = (slot.target for slot in engine._update.slots if slot.name == "weight")
    assert torch.equal(engine.model.weight, before), "the steps are below its precision"
    assert not torch.equal(master.bfloat16().float(), master.detach())
    for _ in range(300):
        engine.step(torch.ones(4, 4))
    assert not torch.equal(engine.model.weight, before)
    engine.close()
