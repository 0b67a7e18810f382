"""Low-rank adapters (peft) over tensor-parallel ranks equal one process: frozen weights are sharded, adapters too."""

from __future__ import annotations

from typing import Any

import peft
import pytest

from tests.lockstep import in_lockstep, plain
from tests.training import Subject, in_one_precision, worst


def adapted(name: str, **more: Any) -> Subject:
    """A model of which only adapters of rank 2 learn; none begins as zeros, so that all get gradients."""
    one = in_one_precision(name, dropout=False)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, lora_dropout=0.25, **more)
    model = peft.get_peft_model(one.model, config).double().train()
    return Subject(model, one.batch, one.loss_fn, one.weight)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_adapters_learn_as_in_one_process(name: str, sequence_parallel: bool) -> None:
    one = adapted(name, target_modules="all-linear")
    batch = one.batch(2, 16)
    loss, gradients = plain(one, batch)
    ran = in_lockstep(one, batch, 2, sequence_parallel)
    assert gradients
    assert all("lora_" in key for key in gradients)
    assert max(abs(each - loss) for each in ran.losses) <= 1e-10
    assert worst(ran.gradients, gradients)[0] <= 1e-10
