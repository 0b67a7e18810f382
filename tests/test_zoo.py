"""Every named case and toy of the zoo builds, trains, and does so the same way twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.zoo import sweep
from tests.zoo.case import Batch, Case, Toy
from tests.zoo.hugging_face import CASES, MISSING, cases
from tests.zoo.plain import TOYS

VARIANTS = list(cases(attentions=True))


def _run(entry: Case | Toy, seed: int = 0) -> tuple[nn.Module, Any, Batch]:
    torch.manual_seed(seed)
    model, batch = entry.build(), entry.batch()
    return model, model(**batch), batch


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_case_trains_the_same_way_twice(case: Case) -> None:
    model, output, _ = _run(case)
    assert model.training
    assert torch.isfinite(output.loss)
    assert torch.equal(output.loss, _run(case)[1].loss)
    output.loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) > 10
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000


@pytest.mark.parametrize("toy", TOYS.values(), ids=lambda toy: toy.name)
def test_toy_trains_the_same_way_twice(toy: Toy) -> None:
    model, output, batch = _run(toy)
    assert model.training
    loss = toy.loss_fn(output, batch)
    _, again, batch = _run(toy)
    assert torch.isfinite(loss)
    assert torch.equal(loss, toy.loss_fn(again, batch))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    copy.deepcopy(toy.build())


def test_batches_follow_the_size_asked_for() -> None:
    for case in CASES.values():
        batch = case.batch(4)
        size = len(
            next(
                batch[name] for name in ("input_ids", "input_values", "input_features", "pixel_values") if name in batch
            )
        )
        assert size == 4, case.name


def test_the_sweep_knows_every_pair_of_this_transformers() -> None:
    status = sweep.read()
    if status["transformers"] != transformers.__version__:
        pytest.skip(f"the list is of transformers {status['transformers']}, other versions have other models")
    named = {f"{model_type}/{task}" for model_type, task in sweep.pairs()}
    assert named == {*status["trains"], *status["fails"]}
    assert not {*status["trains"]} & {*status["fails"]}


@pytest.mark.parametrize("pair", ["bamba/causal-lm", "led/seq2seq-lm", "mra/masked-lm", "swin/image-classification"])
def test_a_shrunken_default_config_trains(pair: str) -> None:
    model_type, _, task = pair.partition("/")
    assert sweep.attempt(model_type, task) == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pair_the_sweep_lists_trains() -> None:
    worker = sweep.Worker()
    failures = {}
    for pair in sweep.read()["trains"]:
        model_type, _, task = pair.partition("/")
        failures[pair] = worker.attempt(model_type, task)[0]
    assert {pair: failure for pair, failure in failures.items() if failure} == {}


def test_a_missing_architecture_says_why() -> None:
    assert not MISSING.keys() & CASES.keys()
    assert all(MISSING.values())
