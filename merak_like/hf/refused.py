"""Arguments of transformers' Trainer that the engine cannot honour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers


def refused(args: Any, more: Mapping[str, Any], kind: type) -> Iterator[tuple[str, Any, str]]:
    """Arguments that change the step in ways the engine does not know."""
    own_loss = kind.compute_loss is not transformers.Trainer.compute_loss
    checks = (
        ("label_smoothing_factor", bool(args.label_smoothing_factor), "pass the loss as engine={'loss_fn': ...}"),
        ("fp16", args.fp16 and not args.deepspeed, "use bf16, or none"),
        ("fsdp", bool(args.fsdp), "the degrees dp, pp and tp say how the model is spread"),
        ("torch_compile", args.torch_compile, "pass engine={'methods': (Compiled(),)}, of runtime.methods.compiled"),
        ("neftune_noise_alpha", args.neftune_noise_alpha is not None, "it adds a hook to a model that is traced"),
        ("auto_find_batch_size", args.auto_find_batch_size, "say memory_limit= in engine= and look at the plan"),
        ("compute_loss_func", more.get("compute_loss_func") is not None, "pass engine={'loss_fn': ...}"),
        ("compute_loss", own_loss, "pass the loss as engine={'loss_fn': ...} instead of overriding it"),
    )
    yield from ((name, getattr(args, name, True), why) for name, asked, why in checks if asked)
