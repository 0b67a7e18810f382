"""DeepSpeed's ZeRO-1 under our engine: the numbers of one process in every layout that is offered, and clear refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import auto_parallel
from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.spreading import Spreading, spreading_of
from tests.ranks import Call, results_of, selected_calls
from tests.test_checkpoints import call as lasting_call
from tests.test_checkpoints import here

there = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
ranks = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(400), there]


def call(name: str, dp: int, pp: int, tp: int = 1, backend: str = "deepspeed", **more: Any) -> Call:
    """A layout and a model."""
    words = [name, backend, *(str(v) for v in more.values()), f"{dp}x{pp}x{tp}"]
    layout = {"dp": dp, "pp": pp, "tp": tp}
    return Call("-".join(words), "tests.spread:deepspeed", {"name": name, "backend": backend, **layout, **more})


EXACT = [
    call("llama", 2, 1),
    call("llama", 1, 2),
    call("gpt2", 2, 2),  # a weight on two stages
    call("gpt2", 2, 2, backend="deepspeed-offload"),
    call("gpt2", 2, 2, backend="deepspeed-offload", adam="cpu_adam"),
    call("llama", 2, 1, backend="deepspeed-offload"),
    call("gpt2", 2, 2, schedule="zb-v"),
    call("falcon", 2, 1, tp=2),  # elements that both tensor-parallel ranks have
    call("llama", 2, 1, tp=2, sequence_parallel=True),
]
LOWERED = [
    Call(f"bf16-{backend}-2x2", "tests.spread:in_precision",
         {"name": "gpt2", "dp": 2, "pp": 2, "precision": "bf16", "zero": 1, "zero_backend": backend})
    for backend in ("deepspeed", "deepspeed-offload")
]  # fmt: skip
SAVING = lasting_call("unbroken", 2, 2, "deepspeed", name="gpt2", zero=1, zero_backend="deepspeed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank."""
    return results_of(selected_calls(request))


@pytest.mark.parametrize("case", [pytest.param(one, id=one.name, marks=ranks) for one in EXACT])
def test_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-5


@pytest.mark.parametrize("case", [pytest.param(one, id=one.name, marks=ranks) for one in LOWERED])
def test_low_precision_is_that_of_one_process(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 4e-2
