"""Every key of DeepSpeed's configuration, and what becomes of it: honoured, decided by us, or refused with advice.

Keys are those of https://www.deepspeed.ai/docs/config-json/ and of deepspeed 0.19's own models; a dot
goes into a section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast


@dataclass(frozen=True)
class Rule:
    """What becomes of a key."""

    allowed: tuple[Any, ...] | None = None
    """The values that may stand there; None: any."""
    advice: str = ""
    """What to do instead of another value."""
    decided: bool = False
    """It tunes DeepSpeed and changes no number: the plan and the engine decide that here."""


HONOURED = Rule()
DECIDED = Rule(decided=True)
OFF: tuple[Any, ...] = (False, None, "none", 0)


def only(advice: str, *allowed: Any) -> Rule:
    """Only some values; by default those that switch it off."""
    return Rule(allowed or OFF, advice)


def _rows(rule: Rule, keys: str, section: str = "") -> dict[str, Rule]:
    return {section + key: rule for key in keys.split()}


_ADAM = "leave it out: Adam's corrections are always made"
_CAST = "leave it out: inputs follow the precision of the model"
_TRACK = "leave it out: use the run's logging section, or merak report"
_BYTES = "leave it out: masters, sums and states are float32"

KEYS: Mapping[str, Rule] = {
    **_rows(HONOURED, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"),
    **_rows(HONOURED, "type params.lr params.betas params.eps params.weight_decay params.adam_w_mode params.momentum "
            "params.nesterov params.dampening", "optimizer."),
    "optimizer.params.torch_adam": HONOURED,
    "optimizer.params.bias_correction": only(_ADAM, True),
    "optimizer.params.amsgrad": only("leave it out"),
    "optimizer.params.fp32_optimizer_states": only(_BYTES, True),
    "optimizer.legacy_fusion": only("leave it out"),
    **_rows(HONOURED, "type params.warmup_min_lr params.warmup_max_lr params.warmup_num_steps params.warmup_type "
            "params.total_num_steps params.warmup_min_ratio params.cos_min_ratio", "scheduler."),
    "scheduler.params.last_batch_iteration": only("leave it out: engine.load knows the step", -1),
    **_rows(HONOURED, "enabled loss_scale initial_scale_power loss_scale_window hysteresis", "fp16."),
    "fp16.auto_cast": only(_CAST),
    "fp16.consecutive_hysteresis": only("leave it out"),
    "fp16.min_loss_scale": DECIDED,  # training ends with an error before a scale gets so small
    "fp16.fp16_master_weights_and_grads": only(_BYTES),
    "fp16.fp16_opt_level": DECIDED,
    "bf16.enabled": HONOURED,
    "bf16.immediate_grad_update": DECIDED,
    "bf16.check_grad_overflow": only("leave it out: gradients are always checked", True),
    **_rows(only(_BYTES), "bf16_master_weights_and_grads bf16_optimizer_states", "bf16."),
    "zero_optimization.stage": HONOURED,
    "zero_optimization.offload_optimizer.device": only("use cpu: there is no other place", "cpu", "none", None),
    **_rows(DECIDED, "pin_memory nvme_path buffer_count fast_init pipeline_read pipeline_write cpuadam_cores_perc",
            "zero_optimization.offload_optimizer."),
    "zero_optimization.offload_optimizer.ratio": only("use 1: all of the state is in the CPU's memory", 1),
    "zero_optimization.offload_optimizer.super_offload": only("leave it out"),
    "zero_optimization.offload_param.device": only("leave it out: use pp or tp, which divide the weights"),
    **_rows(DECIDED, "pin_memory nvme_path buffer_count buffer_size max_in_cpu", "zero_optimization.offload_param."),
    **_rows(DECIDED, "contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
            "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
            "elastic_checkpoint sub_group_size round_robin_gradients parameter_alignment prefetch_bucket_size "
            "param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance "
            "gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params "
            "allgather_sequential stage3_prefetch_bucket_size stage3_param_persistence_threshold "
            "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
            "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
            "memory_efficient_linear ignore_unused_parameters pipeline_loading_checkpoint override_module_apply "
            "log_trace_cache_warnings enable_sanity_checks", "zero_optimization."),
    **_rows(only("write it as offload_optimizer: {device: cpu}"), "cpu_offload cpu_offload_param "
            "cpu_offload_use_pin_memory", "zero_optimization."),
    **_rows(only("leave it out: sums and weights travel as they are"), "zero_quantized_weights "
            "zero_quantized_nontrainable_weights zero_quantized_gradients", "zero_optimization."),
    "zero_optimization.zero_hpz_partition_size": only("leave it out", 1),
    "zero_optimization.legacy_stage1": only("leave it out"),
    **_rows(DECIDED, "zero_allow_untested_optimizer steps_per_print wall_clock_breakdown dump_state memory_breakdown "
            "disable_allgather data_parallel_group global_rank use_data_before_expert_parallelism log_level "
            "disable_python_gc dataloader_drop_last managed_gradient_accumulation check_overflow aio"),
    "zero_force_ds_cpu_optimizer": HONOURED,
    "communication_data_type": only("leave it out: gradients travel in float32", "fp32", None),
    "seq_parallel_communication_data_type": DECIDED,
    "prescale_gradients": only("leave it out: gradients are summed, each with its share of the batch"),
    "gradient_predivide_factor": only("leave it out: gradients are summed, each with its share of the batch", 1),
    "gradient_allreduce_op": only("leave it out: the loss is the mean over the batch", "mean"),
    "sparse_gradients": only("leave it out"),
    **_rows(only(_BYTES, "fp32", None), "grad_accum_dtype", "data_types."),
    **_rows(only(_TRACK), "enabled", "tensorboard."),
    **_rows(only(_TRACK), "enabled", "wandb."),
    **_rows(only(_TRACK), "enabled", "comet."),
    **_rows(only(_TRACK), "enabled", "csv_monitor."),
    "comms_logger.enabled": only("leave it out: use engine.profile()"),
    "flops_profiler.enabled": only("leave it out: use engine.profile() and merak timeline"),
    **{f"activation_checkpointing.{key}": only("leave it out: recompute= decides what is computed again") for key in (
        "partition_activations cpu_checkpointing contiguous_memory_optimization "
        "synchronize_checkpoint_boundary profile").split()},
    "activation_checkpointing.number_checkpoints": only("leave it out: recompute= decides what is computed again"),
    "tensor_parallel.autotp_size": HONOURED,
    "elasticity.enabled": only("leave it out: a checkpoint loads in any layout"),
    "autotuning.enabled": only("leave it out: degrees may be 'auto'"),
    "curriculum_learning.enabled": only("leave it out"),
    "data_efficiency.enabled": only("leave it out"),
    "progressive_layer_drop.enabled": only("leave it out"),
    "eigenvalue.enabled": only("leave it out"),
    "quantize_training.enabled": only("leave it out"),
    "amp.enabled": only("use bf16 or fp16"),
    "torch_autocast.enabled": only("use bf16 or fp16"),
}  # fmt: skip
"""By dotted name."""

ELSEWHERE: Mapping[str, str] = {
    "pipeline": "use pp= and schedule=",
    "compression_training": "leave it out",
    "sparse_attention": "leave it out: attention is the model's own",
    "checkpoint": "leave it out: engine.save writes every checkpoint in the same way",
    "nebula": "leave it out: engine.save(background=True) does not wait either",
    "hybrid_engine": "leave it out: it is for generation between steps",
    "monitor_config": _TRACK,
}
"""Sections that are refused as soon as anything stands in them."""


def settled(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The honoured keys with their values, flat, and the names of those that are decided here.

    Raises ValueError, naming every one, for keys that are unknown or refused.
    """
    honoured, decided, wrong = dict[str, Any](), list[str](), list[str]()
    for key, value in _flat(config):
        rule = KEYS.get(key)
        if rule is None:
            wrong.append(_unknown(key, value, config))
        elif rule.decided:
            decided.append(key)
        elif rule.allowed is not None and value != "auto" and not _among(value, rule.allowed):
            wrong.append(f"{key} = {value!r} ({rule.advice})")
        elif rule.allowed is None or key.endswith("offload_optimizer.device"):
            honoured[key] = value
    wrong = [one for one in wrong if one]
    if wrong:
        raise ValueError(f"the DeepSpeed configuration has what cannot be honoured: {'; '.join(wrong)}")
    return honoured, tuple(decided)


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    sections = {key.rpartition(".")[0] for key in KEYS if "." in key}
    sections |= {part.rpartition(".")[0] for part in sections if "." in part}
    off = isinstance(section.get("enabled"), bool) and not section["enabled"]
    for key, value in section.items():
        name = f"{before}{key}"
        if name in sections and isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, Any], value), f"{name}.")
        elif name in sections and value is None:
            continue
        elif not (off and key != "enabled"):  # a section that is switched off may say what it likes
            yield name, value


def _unknown(key: str, value: Any, config: Mapping[str, Any]) -> str:
    section, _, last = key.rpartition(".")
    if key in ELSEWHERE:
        return f"{key} ({ELSEWHERE[key]})" if value else ""
    if f"{section}.enabled" in KEYS and KEYS[f"{section}.enabled"].allowed is not None:
        return ""  # told once, by its switch
    near = get_close_matches(key, KEYS, 1)
    same = [one for one in KEYS if one.rpartition(".")[2] == last]
    hint = same or near
    return f"unknown key {key}" + (f" (perhaps {hint[0]})" if hint else "")
