"""A run's settings and a DeepSpeed configuration beside them: what "auto" stands for, and who says what."""

from __future__ import annotations

from typing import Any

from merak_like.ds_config.rates import Rate
from merak_like.ds_config.read import loaded, read
from merak_like.trainer.rates import rate, warmup_steps
from merak_like.trainer.settings import Optimizer, Schedule, Settings

LEARNING = ("lr", "betas", "eps", "weight_decay")


def engine_arguments(args: Settings, steps: int, optimizer: Any = None) -> dict[str, Any]:
    """What ``auto_parallel`` learns with, and at which ``rate``, as far as settings and configuration say it.

    ``optimizer`` is the caller's own. Raises ValueError where both say different things: a setting that is as by
    default says nothing.
    """
    asked, learns = args.parallelism, args.optimizer
    given: dict[str, Any] = {
        "optimizer": optimizer, "rate": None, "micro_batches": asked.micro_batches,
        "max_grad_norm": learns.max_grad_norm, "zero": asked.zero, "zero_backend": asked.zero_backend,
        "precision": args.lowered,
    }  # fmt: skip
    shape: Rate = lambda step, own: own * rate(args.schedule, step, steps)  # noqa: E731
    if asked.ds_config is None:
        return given | {"rate": shape}
    if asked.ranks is None:
        raise ValueError("parallelism.ds_config counts batches by replicas: give dp, pp and tp as numbers, not auto")
    batch = args.training.batch
    auto = {
        "train_batch_size": batch, "gradient_accumulation_steps": asked.micro_batches,
        "gradient_clipping": learns.max_grad_norm or 0, "zero_optimization.stage": asked.zero,
        "fp16.enabled": args.precision == "fp16", "bf16.enabled": args.precision == "bf16",
        "scheduler.params.warmup_min_lr": 0.0, "scheduler.params.warmup_max_lr": learns.lr,
        "scheduler.params.warmup_num_steps": warmup_steps(args.schedule, steps),
        "scheduler.params.total_num_steps": steps,
    } | {f"optimizer.params.{key}": getattr(learns, key) for key in LEARNING}  # fmt: skip
    config = loaded(asked.ds_config)
    told = read(config, dp=int(asked.dp), tp=int(asked.tp), samples=batch, auto=auto)
    params = config.get("optimizer", {}).get("params", {})
    said = {key for key in LEARNING if params.get(key) != "auto"} | {"name", "decay_all", "flat"}
    twice = [f"optimizer.{key}" for key in sorted(said) if getattr(learns, key) != getattr(Optimizer(), key)]
    both = twice if told.optimizer is not None else []
    warm = config.get("scheduler", {}).get("params", {}).get("warmup_num_steps") == "auto"
    said_of_rate = args.schedule.model_copy(update={"warmup": 0}) if warm else args.schedule
    if told.rate is not None and said_of_rate != Schedule():
        both.append("schedule")
    if told.precision is not None and args.precision == "autocast":
        both.append("precision = autocast")
    if both:
        raise ValueError(f"the settings and {asked.ds_config} both say {', '.join(both)}: say it once")
    told.tell()
    if told.clips and learns.max_grad_norm == Optimizer().max_grad_norm:
        given["max_grad_norm"] = None
    found = told.over(given)
    return found | {"rate": found["rate"] or shape}
