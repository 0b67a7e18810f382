"""The engine alone on a CUDA device: the numbers of plain training there, and nobody else's random numbers touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.scenarios import PARTS, SAMPLES
from tests.training import Subject, by_engine, engine, plainly, same, toy
from tests.zoo.case import Batch, Toy

pytestmark = pytest.mark.gpu


def mixer() -> tuple[Subject, Subject]:
    """A model with dropout: on the CPU for the engine, on the device for plain training."""
    from tests.zoo.plain import TOYS

    one: Toy = TOYS["mlp_mixer"]
    here = toy(one)

    def there(*size: Any) -> Batch:
        return {name: value.cuda() for name, value in here.batch(*size).items()}

    return here, replace(here, model=copy.deepcopy(here.model).cuda(), batch=there)


def test_training_on_the_device_equals_plain_training_there() -> None:
    here, there = mixer()
    ours = by_engine(here, [here.batch(SAMPLES)] * 4, 1, 1, PARTS, device="cuda")
    theirs = plainly(there, [there.batch(SAMPLES)] * 4, PARTS)
    steps = [replace(s, gradients={k: g.cpu() for k, g in s.gradients.items()}) for s in theirs.steps]
    plain = replace(theirs, steps=steps, weights={k: w.cpu() for k, w in theirs.weights.items()})
    assert same(ours, plain, 1e-10) <= 1e-10


def test_random_numbers_of_the_host_and_the_device_go_on() -> None:
    here, _ = mixer()
    torch.manual_seed(11)
    wanted = [torch.rand(3), torch.rand(3, device="cuda").cpu()]
    torch.manual_seed(11)
    ours = engine(here, here.batch(SAMPLES), 1, 1, PARTS, device="cuda")
    ours.step(here.batch(SAMPLES))
    ours.evaluate(here.batch(SAMPLES))
    found = [torch.rand(3), torch.rand(3, device="cuda").cpu()]
    ours.close()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
