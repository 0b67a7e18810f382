"""A user's DeepSpeed configuration: every key is honoured or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import auto_parallel
from merak_like.ds_config.keys import KEYS, settled
from merak_like.ds_config.rates import rate_of
from merak_like.ds_config.read import Choices, read
from merak_like.ds_config.read import arguments as told_with
from merak_like.runtime.finite import LossScale
from merak_like.runtime.precision import Precision

USUAL: dict[str, Any] = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale_window": 7, "auto_cast": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 4}},
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


def told(**changes: Any) -> Choices:
    """What the usual configuration says with some keys changed."""
    return read(USUAL | changes, dp=2, samples=changes.get("train_batch_size", 16) or 16)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3))]


def test_usual_configuration_is_honoured_key_by_key() -> None:
    found = told()
    assert (found.batch, found.micro_batches, found.max_grad_norm) == (16, 4, 0.5)
    assert (found.zero, found.zero_backend, found.precision) == (2, None, Precision(torch.bfloat16))
    assert found.optimizer is not None
    made = found.optimizer(weights())
    assert isinstance(made, torch.optim.AdamW)
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.95), 0.1)
    assert found.rate is not None
    assert found.decided == (
        "zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size",
        "zero_optimization.contiguous_gradients", "steps_per_print", "wall_clock_breakdown",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ({}, None), ({"train_batch_size": 16}, 1), ({"train_micro_batch_size_per_gpu": 8}, 1),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, 4),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 4),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, 2),
        ({"gradient_accumulation_steps": 8}, 8),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}, None),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}, 4),
    ],
)  # fmt: skip
def test_batch_is_micro_batch_times_accumulation_times_replicas(counts: dict[str, Any], parts: int | None) -> None:
    found = read(counts, dp=2, samples=16, auto={"train_batch_size": 16})
    assert (found.batch, found.micro_batches) == (16, 1 if counts.get("train_batch_size") and not parts else parts)


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3}, r"16 is not .* 3 \* 2 \* 2"),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 3}, r"16 is not .* a whole number \* 3 \* 2"),
        ({"train_batch_size": 32}, r"trains on 32 samples a step \(dp=2\), but the example has 16: make batches of 32"),
        ({"train_batch_size": 0}, "at least 1"),
    ],
)
def test_batches_that_do_not_fit_are_refused(counts: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read(counts, dp=2, samples=16)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gradient_cliping": 1.0}, r"unknown key gradient_cliping \(perhaps gradient_clipping\)"),
    ({"zero_optimization": {"stag": 1}}, r"unknown key zero_optimization.stag \(perhaps zero_optimization.stage\)"),
    ({"stage": 1}, r"unknown key stage \(perhaps zero_optimization.stage\)"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        "offload_param.device = 'cpu'.*use pp or",
    ),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, "device = 'nvme' .use cpu"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "stage 1 with it, or stage 2 without",
    ),
    ({"zero_optimization": {"cpu_offload": True}}, "write it as offload_optimizer"),
    ({"zero_optimization": {"stage": 1, "zero_quantized_gradients": True}}, "zero_quantized_gradients = True"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
    ({"fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast = True"),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states = True .*float32"),
    ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer.type = 'Lamb': it is Adam, AdamW or SGD"),
    ({"optimizer": {"type": "SGD", "params": {"betas": [0, 1]}}}, "params of SGD has not betas"),
    ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, "stands for nothing here: optimizer.params.lr"),
    ({"scheduler": {"type": "OneCycle", "params": {}}}, "'OneCycle' is none of WarmupLR, WarmupDecayLR"),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, "WarmupDecayLR: missing 1 required .*total_num_steps"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, "it is log or linear"),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled = True .*merak timeline"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "recompute= decides"),
    ({"pipeline": {"stages": 2}}, r"pipeline \(use pp= and schedule=\)"),
    ({"tensor_parallel": {"autotp_size": 4}}, "autotp_size = 4, but tp = 1"),
    ({"prescale_gradients": True, "sparse_gradients": True}, "prescale_gradients = True.*sparse_gradients = True"),
    ({"communication_data_type": "fp16"}, "communication_data_type = 'fp16'"),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp.enabled = True .use bf16 or fp16"),
]


@pytest.mark.parametrize(
    ("config", "match"), REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_what_cannot_be_honoured_is_refused_by_name(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read(config, dp=1, samples=4)


def test_sections_that_are_switched_off_may_say_what_they_like() -> None:
    honoured, decided = settled({
        "flops_profiler": {"enabled": False, "profile_step": 1}, "amp": {"enabled": False, "opt_level": "O1"},
        "zero_optimization": {"offload_optimizer": None, "offload_param": {"device": "none"}}, "pipeline": {},
    })  # fmt: skip
    assert (honoured, decided) == ({}, ())


def test_what_no_key_says_is_as_deepspeed_has_it() -> None:
    found = read({}, dp=2, samples=6)
    assert (found.max_grad_norm, found.clips) == (1.0, False)
    assert (found.zero, found.precision, found.optimizer, found.rate, found.batch) == (0, None, None, None, 6)
    assert read({"gradient_clipping": 0.0}, dp=1, samples=1).max_grad_norm is None


GIVEN: dict[str, Any] = {
    "optimizer": None, "rate": None, "micro_batches": None, "max_grad_norm": None, "precision": None, "zero": 0,
    "zero_backend": None,
}  # fmt: skip
ONE: dict[str, Any] = {"dp": 2, "pp": 1, "tp": 1}


@pytest.mark.parametrize(
    ("config", "given", "match"),
    [
        ({"zero_optimization": {"stage": 0}}, {"zero": 2}, "zero = 2, but zero_optimization.stage says no"),
        ({"gradient_clipping": 0}, {"max_grad_norm": 1.0}, "max_grad_norm = 1.0, but gradient_clipping says no"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, "precision = .*bfloat16.*, but bf16.enabled says no"),
        ({"fp16": {"enabled": False}}, {"precision": "fp16"}, "but fp16.enabled says no"),
        ({"bf16": {"enabled": True}}, {"precision": "fp16"}, "precision = .*float16.*, not .*bfloat16"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}},
         {"zero": 1, "zero_backend": "deepspeed-offload"}, "offload_optimizer.device says no"),
        ({"fp16": {"enabled": True, "loss_scale": 8}}, {"precision": Precision(torch.float16, 4.0)}, "not Precision"),
    ],
)  # fmt: skip
def test_no_argument_wins_silently_over_a_no(config: dict[str, Any], given: dict[str, Any], match: str) -> None:
    """A 0 or a false was taken for silence, and the argument was used."""
    with pytest.raises(ValueError, match=match):
        told_with(config, ONE, 16, GIVEN | given)


def test_what_is_no_contradiction_is_none() -> None:
    off = {"zero_optimization": {"stage": 0}, "gradient_clipping": 0, "bf16": {"enabled": False}}
    assert told_with(off, ONE, 16, GIVEN) == GIVEN
    assert told_with({"bf16": {"enabled": False}}, ONE, 16, GIVEN | {"precision": "fp16"})["precision"].loss_scale
    same = {"gradient_clipping": "auto", "zero_optimization": {"stage": "auto"}}
    found = told_with(same, ONE, 16, GIVEN | {"zero": 2, "max_grad_norm": 0.5})
    assert (found["zero"], found["max_grad_norm"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("section", "level"),
    [({}, "auto"), ({"stage": "auto"}, "auto"), ({"stage": 0}, 0), ({"stage": 2}, 2)],
)  # fmt: skip
def test_level_to_be_chosen_is_chosen_unless_the_configuration_says_it(section: dict[str, Any], level: Any) -> None:
    """Beside a configuration, of which no word was about it, "auto" was level 0."""
    assert told_with({"zero_optimization": section}, ONE, 16, GIVEN | {"zero": "auto"})["zero"] == level


@pytest.mark.parametrize("enabled", ["auto", True])
def test_half_precision_by_name_has_the_configurations_scale(enabled: Any) -> None:
    """Both said fp16, each with a loss scale of its own, and were said to contradict each other."""
    section = {"enabled": enabled, "loss_scale_window": 7}
    found = told_with({"fp16": section}, ONE, 16, GIVEN | {"precision": "fp16"})
    assert found["precision"] == Precision(torch.float16, 2.0**16, 7, 2)
    own = Precision(torch.float16, 8.0, 5)
    assert told_with({"fp16": {"enabled": enabled}}, ONE, 16, GIVEN | {"precision": own})["precision"] == own


@pytest.mark.parametrize(
    ("params", "kind", "decay"),
    [
        ({}, "AdamW", 0.0), ({"adam_w_mode": False}, "Adam", 0.0), ({"torch_adam": True}, "AdamW", 0.01),
        ({"torch_adam": True, "adam_w_mode": False, "weight_decay": 0.3}, "Adam", 0.3),
    ],
)  # fmt: skip
def test_adam_is_the_one_that_deepspeed_makes(params: dict[str, Any], kind: str, decay: float) -> None:
    factory = told(optimizer={"type": "Adam", "params": params}).optimizer
    assert factory is not None
    made = factory(weights())
    assert (type(made).__name__, made.param_groups[0]["weight_decay"]) == (kind, decay)


def test_half_precision_has_deepspeeds_loss_scale() -> None:
    half = {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 2}
    assert told(bf16={}, fp16=half).precision == Precision(torch.float16, 1024.0, 3, 2)
    assert told(bf16={}, fp16={"enabled": True, "loss_scale": 128}).precision == Precision(torch.float16, 128.0, None)


def test_loss_scale_is_patient_and_may_stay() -> None:
    scale = LossScale(8.0, interval=3, patience=2)
    seen = []
    for finite in (False, True, False, False, True, True, True, False, False):
        scale.after(finite)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 2, 2, 2, 4, 4, 2]
    fixed = LossScale(8.0, interval=None)
    fixed.after(False)
    assert fixed.value == 8


def test_offload_is_deepspeeds_with_its_own_adam() -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    found = told(zero_optimization=zero)
    assert (found.zero, found.zero_backend) == (1, "deepspeed-offload")
    assert getattr(found.optimizer, "func").__name__ == "cpu_adam"  # noqa: B009
    plain = told(zero_optimization=zero, zero_force_ds_cpu_optimizer=False).optimizer
    assert getattr(plain, "func") is torch.optim.AdamW  # noqa: B009


RATES = [
    ("WarmupLR", {"warmup_num_steps": 4, "warmup_min_lr": 0.1, "warmup_max_lr": 0.5, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_num_steps": 5}),
    ("WarmupDecayLR", {"total_num_steps": 9, "warmup_num_steps": 3, "warmup_max_lr": 0.2}),
    ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 3, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}),
]


def test_rates_are_the_formulas() -> None:
    linear = rate_of(*RATES[0])
    assert [round(linear(step, 9.9), 6) for step in range(7)] == [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    log = rate_of(*RATES[1])
    assert [round(log(step, 1.0), 4) for step in range(7)] == [0.0, 0.0, 0.4307, 0.6826, 0.8614, 1.0, 1.0]


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), RATES)
def test_rates_are_those_of_deepspeed(name: str, params: dict[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules  # pyright: ignore[reportMissingImports]

    optimizer = torch.optim.SGD(weights(), lr=0.3)
    theirs, ours = getattr(lr_schedules, name)(optimizer, **params), rate_of(name, params)
    for step in range(14):
        assert ours(step, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        theirs.step()


@pytest.mark.deepspeed
@pytest.mark.slow
def test_every_key_of_deepspeeds_models_is_known() -> None:
    from deepspeed.runtime import precision_config as precision  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero import config, offload_config  # pyright: ignore[reportMissingImports]

    sections = {
        "zero_optimization.": config.DeepSpeedZeroConfig, "fp16.": precision.DeepSpeedFP16Config,
        "bf16.": precision.DeepSpeedBF16Config,
        "zero_optimization.offload_optimizer.": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param.": offload_config.DeepSpeedZeroOffloadParamConfig,
    }  # fmt: skip
    unknown = [
        f"{start}{key}"
        for start, model in sections.items()
        for key in model.model_fields
        if f"{start}{key}" not in KEYS
    ]
    sections_within = {"zero_optimization.offload_optimizer", "zero_optimization.offload_param"}
    assert set(unknown) - sections_within == {
        "zero_optimization.zenflow", "zero_optimization.save_muon_momentum_buffer_in_memory",
        "zero_optimization.leaf_module",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the engine


def engine(config: Any, **more: Any) -> Any:
    """One process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return auto_parallel(
        model, example=torch.ones(8, 4), loss_fn=lambda outputs, batch: outputs.square().mean(), device="cpu",
        hardware="a100-80gb", ds_config=config, **more,
    )  # fmt: skip


def test_engine_trains_as_the_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto", "gradient_clipping": 0.01,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "zero_optimization": {"stage": "auto"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}},
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    ours = engine(path)
    assert ours.plan.micro_batches == 4
    rates, moved = [], []
    for _ in range(4):
        before = [p.detach().clone() for p in ours.model.parameters()]
        ours.step(torch.ones(8, 4))
        rates.append(ours.optimizer.param_groups[0]["lr"])
        pieces = [(p - b).flatten() for p, b in zip(ours.model.parameters(), before, strict=True)]
        moved.append(torch.cat(pieces).norm().item())
    ours.close()
    assert rates == [0.0, 0.0, 0.25, 0.5]
    assert moved == pytest.approx([0.0, 0.0, 0.25 * 0.01, 0.5 * 0.01], rel=1e-3, abs=1e-9), "clipped to 0.01"


def test_engine_says_what_it_decides_itself_and_what_is_said_twice() -> None:
    with pytest.warns(UserWarning, match="ds_config: steps_per_print tune DeepSpeed and change no number"):
        engine({"steps_per_print": 10}).close()
    with pytest.raises(ValueError, match="say different things: micro_batches = 2, not 4"):
        engine({"gradient_accumulation_steps": 4}, micro_batches=2)
    with pytest.raises(ValueError, match="zero=5: it is 0, 1"):
        engine({"zero_optimization": {"stage": 5}})
    with pytest.raises(ValueError, match="give dp, pp and tp as numbers"):
        engine({}, dp="auto")
    with pytest.raises(ValueError, match=r"there is no DeepSpeed configuration 'nowhere.json'"):
        engine("nowhere.json")
