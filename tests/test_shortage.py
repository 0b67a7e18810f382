"""Memory that ends: the error says where, what is there and what would fit, and leaves a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime import shortage
from merak_like.runtime.shortage import NoMemory
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Logging, Optimizer, Parallelism, Settings, Training

PETABYTE = 10**15


class Hungry(nn.Linear):
    """A layer that at some time wants more than any machine has; the allocator says no to it, not the test."""

    wants = 0

    def forward(self, input: Tensor) -> Tensor:
        torch.empty(self.wants, dtype=torch.uint8)
        return super().forward(input)


class Greedy(torch.optim.AdamW):
    """The same in the update."""

    wants = 0

    def step(self, closure: Any = None) -> Any:
        torch.empty(self.wants, dtype=torch.uint8)
        return super().step(closure)


def loss(out: Tensor, batch: Tensor) -> Tensor:
    """Say the input again."""
    return (out - batch).square().mean()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), Hungry(64, 64))


def test_error_says_where_what_is_there_and_what_would_fit(model: Any, tmp_path: Path) -> None:
    batch = torch.randn(8, 64)
    engine = auto_parallel(
        model, example=batch, loss_fn=loss, optimizer=Greedy, micro_batches=2, hardware="a100-80gb", device="cpu"
    )  # fmt: skip
    engine.step(batch)
    weights = sum(p.numel() for p in model.parameters()) * 4
    model[2].wants = PETABYTE
    with pytest.raises(NoMemory) as caught:
        engine.step(batch)
    model[2].wants = 0
    message, record = str(caught.value), caught.value.record
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert record["doing"] == "the forward of micro-batch 0 on stage 0"
    assert (record["rank"], record["step"], record["asked"]) == (0, 1, PETABYTE)
    kinds = record["kinds"]
    assert kinds["weights"] == weights
    assert 2 * weights <= kinds["optimizer"] <= 2 * weights + 4 * 64
    assert record["used"] == sum(kinds.values()) + record["rest"]
    assert "no memory for 1000 TB more in step 1, in the forward of micro-batch 0 on stage 0" in message
    assert f"plan again with memory_limit={int(0.9 * record['planned'])}" in message
    assert "or micro_batches=4 (half as many samples in each)" in message
    caught.value.save(tmp_path)
    assert json.loads((tmp_path / "rank-0.json").read_text()) == record
    engine.step(batch)  # the engine is as it was
    assert engine.optimizer is not None
    engine.optimizer.wants = PETABYTE  # type: ignore[attr-defined]
    with pytest.raises(NoMemory, match=r"in what is outside of stages \(sums of gradients, the update\)") as caught:
        engine.step(batch)
    assert caught.value.record["kinds"]["gradients"] == weights
    engine.close()


def test_trainer_leaves_a_record(model: Any, tmp_path: Path) -> None:
    settings = Settings(
        training=Training(steps=2, batch=4), optimizer=Optimizer(), folder=tmp_path,
        parallelism=Parallelism(hardware="a100-80gb", device="cpu"), logging=Logging(console=False),
    )  # fmt: skip
    trainer = Trainer(model, settings, list(torch.randn(8, 64).unbind()), loss_fn=loss)
    model[2].wants = PETABYTE
    with pytest.raises(NoMemory):
        trainer.train()
    trainer.close()
    assert json.loads((tmp_path / "memory/rank-0.json").read_text())["asked"] == PETABYTE


def test_snapshot_of_a_gpu_lies_beside_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that is not here."""
    written: list[Path] = []
    monkeypatch.setattr(shortage, "dump_memory", written.append)
    NoMemory("no", {"rank": 3}, torch.device("cuda")).save(tmp_path)
    assert written == [tmp_path / "rank-3.memory"]


def test_other_errors_stay_what_they_are(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(4, 64)
    engine = auto_parallel(model, example=batch, loss_fn=loss, hardware="a100-80gb", device="cpu")
    monkeypatch.setattr(Hungry, "wants", -1)
    with pytest.raises(RuntimeError, match="negative dimension") as caught:
        engine.step(batch)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    engine.close()
