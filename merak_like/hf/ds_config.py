"""``args.deepspeed`` of a ``transformers.TrainingArguments``, as arguments of the engine.

"auto" stands for what transformers documents for it: the arguments' own batch, rate, decay, clipping and precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from merak_like.ds_config.read import ARGUMENTS, Choices, read


class Asked:
    """A configuration, if there is one, and what it comes to once the number of steps is known."""

    def __init__(self, args: Any, options: dict[str, Any]) -> None:
        """``options`` are the engine's; ``ds_config`` is taken out of them."""
        self._args, self._options = args, options
        self.config: Any = options.pop("ds_config", None) or args.deepspeed
        self.told: Choices | None = None

    def settle(self, dp: int, tp: int, steps: int) -> dict[str, Any]:
        """Arguments of ``auto_parallel``; {} without a configuration. Raises ValueError for what is refused."""
        args = self._args
        if self.config is None:
            return {}
        parts = args.per_device_train_batch_size * args.gradient_accumulation_steps * dp
        auto = {
            "train_batch_size": parts, "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps, "gradient_clipping": args.max_grad_norm,
            "optimizer.params.lr": args.learning_rate, "optimizer.params.betas": [args.adam_beta1, args.adam_beta2],
            "optimizer.params.eps": args.adam_epsilon, "optimizer.params.weight_decay": args.weight_decay,
            "scheduler.params.warmup_min_lr": 0.0, "scheduler.params.warmup_max_lr": args.learning_rate,
            "scheduler.params.warmup_num_steps": args.get_warmup_steps(max(steps, 1)),
            "scheduler.params.total_num_steps": steps if steps > 0 else None,
            "fp16.enabled": args.fp16, "bf16.enabled": args.bf16,
        }  # fmt: skip
        told = self.told = read(self.config, dp=dp, tp=tp, samples=parts, auto=auto)
        told.tell()
        names = ("micro_batches", "precision", "zero", "zero_backend")
        given = {name: self._options.get(name) for name in names}
        given["precision"] = given["precision"] or ("bf16" if args.bf16 else "fp16" if args.fp16 else None)
        found = told.over({**dict.fromkeys(ARGUMENTS), **given})
        found = {name: found[name] for name in names if found[name] is not None}
        return found | ({"max_grad_norm": told.max_grad_norm} if told.clips else {})

    def optimizer(self, otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The configuration's, or the one that transformers makes."""
        return self.told.optimizer if self.told is not None and self.told.optimizer is not None else otherwise

    def scheduler(self, optimizer: torch.optim.Optimizer, otherwise: Any) -> Any:
        """The configuration's schedule, for transformers' loop to step; or the one that transformers made."""
        rate = None if self.told is None else self.told.rate
        if rate is None:
            return otherwise
        own = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        shares = [lambda step, lr=lr, rate=rate: rate(step, lr) / lr for lr in own]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
