"""A run's settings with a DeepSpeed configuration beside them: who says what, and that the engine does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like.trainer.deepspeed import engine_arguments
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Logging, Optimizer, Parallelism, Schedule, Settings, Training

AUTO: dict[str, Any] = {
    "train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto",
                                                 "warmup_min_lr": "auto", "warmup_type": "linear"}},
}  # fmt: skip


def asked(folder: Path, config: dict[str, Any], parallelism: dict[str, Any] | None = None, **more: Any) -> Settings:
    """Six steps on one rank."""
    file = folder / "ds.json"
    file.write_text(json.dumps(config))
    spread = {"hardware": "a100-80gb", "device": "cpu", "ds_config": file} | (parallelism or {})
    given: dict[str, Any] = {
        "training": Training(steps=6, batch=4), "logging": Logging(every=1, console=False), "folder": folder / "run",
    }  # fmt: skip
    return Settings(parallelism=Parallelism(**spread), **(given | more))


def test_auto_is_what_the_settings_say(tmp_path: Path) -> None:
    settings = asked(
        tmp_path, AUTO, {"zero": 1}, precision="bf16", schedule=Schedule(warmup=4),
        optimizer=Optimizer(lr=0.2, weight_decay=0.3, max_grad_norm=0.5),
    )  # fmt: skip
    found = engine_arguments(settings, 6)
    assert (found["zero"], found["max_grad_norm"], found["precision"].compute) == (1, 0.5, torch.bfloat16)
    group = found["optimizer"]([nn.Parameter(torch.ones(1))]).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)
    assert found["rate"](6, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("config", "more", "match"),
    [
        ({"optimizer": {"type": "SGD", "params": {}}}, {"optimizer": Optimizer(lr=0.2)}, "both say optimizer.lr"),
        (AUTO, {"optimizer": Optimizer(name="sgd")}, "both say optimizer.name"),
        (AUTO, {"schedule": Schedule(name="cosine")}, "both say schedule"),
        ({"bf16": {"enabled": True}}, {"precision": "autocast"}, "precision = autocast"),
        ({"gradient_clipping": 0}, {"optimizer": Optimizer(max_grad_norm=0.5)}, "gradient_clipping says no"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, r"bf16.enabled says no"),
        ({"train_batch_size": 8}, {}, "trains on 8 samples a step"),
        ({"gradient_cliping": 1}, {}, "unknown key gradient_cliping"),
    ],
)  # fmt: skip
def test_what_both_say_is_refused(tmp_path: Path, config: dict[str, Any], more: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine_arguments(asked(tmp_path, config, **more), 6)


def test_degrees_that_are_not_known_yet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give dp, pp and tp as numbers"):
        engine_arguments(asked(tmp_path, AUTO, {"dp": "auto"}), 6)


def test_the_run_learns_as_the_configuration_says(tmp_path: Path) -> None:
    config = {
        "gradient_clipping": 0.01, "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
    }  # fmt: skip
    torch.manual_seed(0)
    samples = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    trainer = Trainer(
        nn.Linear(3, 3), asked(tmp_path, config), samples, loss_fn=lambda out, batch: (out - batch).square().mean()
    )
    torch.manual_seed(0)
    plain = nn.Linear(3, 3)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.history if "learning_rate" in line]
    assert rates == pytest.approx([0.0, 0.0, 0.125, 0.25, 0.375, 0.5])
    for step, lr in enumerate(rates):
        batch = torch.stack([samples[i] for i in trainer.loader.order.at(4 * step, 4)])
        plain.zero_grad()
        (plain(batch) - batch).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        with torch.no_grad():
            for parameter in plain.parameters():
                assert parameter.grad is not None
                parameter -= lr * parameter.grad
    for name, tensor in trainer.engine.full_state_dict().items():
        assert torch.allclose(tensor, plain.state_dict()[name], atol=1e-6), name
    trainer.close()
