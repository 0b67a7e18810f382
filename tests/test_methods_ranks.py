"""Methods on several ranks: the same numbers as plain PyTorch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.flat_adamw import FlatAdamW
from merak_like.runtime.methods.head_loss import ChunkedLoss
from merak_like.runtime.methods.offload import Offload
from tests.ranks import Call, results_of, selected_calls
from tests.training import by_engine, in_one_precision, plainly, same

CHUNK = 4 * 64 * 5


def flat(parameters: Any) -> torch.optim.Optimizer:
    """The tests' optimizer, in one piece."""
    return FlatAdamW(parameters, lr=1e-3, weight_decay=0.1)


def together(dp: int, pp: int, zero: int) -> bool:
    """A tied language model with both, on a layout."""
    one = in_one_precision("gpt2")
    batches = [one.batch(8, 12), one.batch(8, 10)]
    ours = by_engine(one, batches, dp, pp, 2, methods=[ChunkedLoss(CHUNK)], optimizer=flat, zero=zero)
    if ours.weights:
        same(ours, plainly(one, batches, 2 * dp), 1e-10)
    return True


def packed(dp: int, pp: int, tp: int) -> float:
    """How far few bits take the gradients of a layout from those of one process."""
    one = in_one_precision("gpt2", dropout=False)
    method = Compress(0.003, adapt=False)
    ours = by_engine(one, [one.batch(8, 48)], dp, pp, 2, tp=tp, methods=[method], max_grad_norm=None)
    assert method.counted[0] > 3 * method.counted[1] > 0
    if not ours.weights:
        return 0.0
    theirs = plainly(one, [one.batch(8, 48)], 2 * dp, None).steps[0].gradients
    mine = ours.steps[0].gradients
    return max(float((mine[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.ndim > 1)


def elsewhere(dp: int, pp: int, tp: int) -> bool:
    """Training whose activations wait in another memory, beside plain training."""
    one = in_one_precision("gpt2")
    batches, method = [one.batch(8, 48), one.batch(8, 40)], Offload()
    ours = by_engine(one, batches, dp, pp, 2, tp=tp, methods=[method])
    assert method.parking.counted.back == method.parking.counted.out > 0
    if ours.weights:
        same(ours, plainly(one, batches, 2 * dp), 1e-10)
    return True


def call(function: str, **arguments: int) -> Call:
    return Call(f"{function} {arguments}", f"tests.test_methods_ranks:{function}", arguments)


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Any:
    return results_of(selected_calls(request))


LAYOUTS = [call("together", dp=d, pp=p, zero=z) for d, p, z in ((2, 1, 0), (2, 1, 1), (2, 1, 2), (1, 2, 0))]
PACKED = [call("packed", dp=d, pp=p, tp=t) for d, p, t in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]

AWAY = [call("elsewhere", dp=d, pp=p, tp=t) for d, p, t in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("one", AWAY, ids=lambda c: c.name)
def test_activations_in_another_memory_are_plain_training(one: Call, result: Any):
    assert result(one) == [True, True]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("one", LAYOUTS, ids=lambda c: c.name)
def test_flat_steps_without_logits_are_plain_training(one: Call, result: Any):
    assert result(one) == [True, True]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("one", PACKED, ids=lambda c: c.name)
def test_few_bits_stay_within_twice_the_bound(one: Call, result: Any):
    assert 0 < max(result(one)) <= 0.006
