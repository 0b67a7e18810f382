"""transformers' arguments with a DeepSpeed configuration: "auto" is what the arguments say, and the engine does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like import api
from merak_like.ds_config.rates import warmup_decay
from merak_like.hf.ds_config import Asked
from merak_like.hf.trainer import HFTrainer
from tests.test_ds_config import engine
from tests.trainer_runs import BATCH, SAMPLES, STEPS, arguments, build, by_transformers, data

AUTO: dict[str, Any] = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "initial_scale_power": 12},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
}  # fmt: skip
LEARNING: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}


def test_auto_is_what_the_arguments_say(tmp_path: Path) -> None:
    options = {"ds_config": AUTO | LEARNING, "schedule": "gpipe"}
    asked = Asked(arguments(str(tmp_path), 2, 4, bf16=True), options)
    with pytest.warns(UserWarning, match="zero_optimization.reduce_bucket_size tune DeepSpeed"):
        found = asked.settle(dp=2, tp=1, steps=30)
    assert options == {"schedule": "gpipe"}
    assert asked.told is not None
    assert (asked.told.batch, found["micro_batches"], found["max_grad_norm"], found["zero"]) == (16, 4, 1.0, 1)
    assert found["precision"].compute == torch.bfloat16
    made = asked.optimizer(lambda _: None)([torch.nn.Parameter(torch.ones(2))])
    assert (type(made).__name__, made.defaults["lr"], made.defaults["weight_decay"]) == ("AdamW", 1e-3, 0.1)
    schedule = asked.scheduler(made, None)
    expected = warmup_decay(total_num_steps=30, warmup_max_lr=1e-3, warmup_num_steps=5)
    for step in range(8):
        assert made.param_groups[0]["lr"] == pytest.approx(expected(step, 1e-3))
        made.step()
        schedule.step()


def test_options_of_the_engine_stay_unless_the_configuration_says_otherwise(tmp_path: Path) -> None:
    clipping, options = {"gradient_clipping": 1.0}, {"precision": "bf16", "zero": 2}
    found = Asked(arguments(str(tmp_path), 2, 4), {"ds_config": clipping} | options).settle(dp=2, tp=1, steps=3)
    assert (found["zero"], found["precision"].compute, found["max_grad_norm"]) == (2, torch.bfloat16, 1.0)
    asked = Asked(arguments(str(tmp_path), 2, 4), {"ds_config": {"zero_optimization": {"stage": 1}}} | options)
    with pytest.raises(ValueError, match="zero = 2, not 1; say it once"):
        asked.settle(dp=2, tp=1, steps=3)


def test_precision_of_the_arguments_is_not_lost_beside_a_configuration(tmp_path: Path) -> None:
    given = arguments(str(tmp_path), 2, 4, bf16=True)
    found = Asked(given, {"ds_config": {"gradient_clipping": 1.0}}).settle(dp=2, tp=1, steps=3)
    assert found["precision"].compute == torch.bfloat16
    with pytest.raises(ValueError, match=r"bf16.enabled says no"):
        Asked(given, {"ds_config": {"bf16": {"enabled": False}}}).settle(dp=2, tp=1, steps=3)


def test_nothing_is_changed_without_a_configuration(tmp_path: Path) -> None:
    asked = Asked(arguments(str(tmp_path), 2, 4), {})
    assert asked.settle(dp=1, tp=1, steps=3) == {}
    assert asked.scheduler(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), "own") == "own"


def trained(tmp_path: Path, config: Any, **more: Any) -> Any:
    """Some steps in one process; the configuration is the engine's, or the arguments' own."""
    engine = {"hardware": "a100-80gb"} | ({} if "deepspeed" in more else {"ds_config": config})
    trainer = HFTrainer(
        build("llama"), arguments(str(tmp_path), BATCH // 2, 2, **more), train_dataset=data("llama", SAMPLES, 1),
        eval_dataset=data("llama", 20, 2), engine=engine,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="tune DeepSpeed"):
        trainer.train()
    return trainer


@pytest.mark.slow
def test_trains_as_transformers_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path, AUTO)
    theirs = by_transformers("llama", BATCH // 2, 2)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx(theirs.loss, abs=1e-5)
    assert trainer.engine._update._store is not None, "zero=1"
    trainer.engine.close()


@pytest.mark.slow
def test_its_optimizer_and_schedule_are_used(tmp_path: Path) -> None:
    trainer = trained(tmp_path, AUTO | LEARNING)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    expected = warmup_decay(total_num_steps=STEPS, warmup_max_lr=1e-3, warmup_num_steps=5)
    assert rates == pytest.approx([expected(step, 1e-3) for step in range(STEPS)], abs=1e-9)
    assert {group["weight_decay"] for group in trainer.engine.optimizer.param_groups} == {0.1}, "of every weight"
    trainer.engine.close()


@pytest.mark.slow
@pytest.mark.deepspeed
def test_arguments_own_configuration_is_taken(tmp_path: Path) -> None:
    trainer = trained(tmp_path, None, deepspeed=AUTO)
    assert not trainer.is_deepspeed_enabled
    assert trainer.engine._update._store is not None
    trainer.engine.close()


def test_level_is_chosen_for_the_configurations_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def best(*given: Any) -> Any:
        asked.append(given[3])
        return found(*given)

    found = api.best_layout
    monkeypatch.setattr(api, "best_layout", best)
    engine({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}, zero="auto").close()
    engine({}, zero="auto").close()
    assert [one.zero for one in asked] == [None], "nothing to spread without an optimizer"
