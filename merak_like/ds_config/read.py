"""From DeepSpeed's configuration to the arguments of ``auto_parallel``: a pure function of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merak_like.ds_config.keys import settled
from merak_like.ds_config.rates import Rate, rate_of
from merak_like.runtime.deepspeed_zero import cpu_adam
from merak_like.runtime.initialize import rank
from merak_like.runtime.precision import Precision, precision_of
from merak_like.runtime.spreading import OFFLOAD

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
CLIPPING = 1.0
"""DeepSpeed's, where the configuration says nothing."""
OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "weight_decay", "nesterov", "dampening"),
}
"""By lower-case name: their parameters."""


SWITCHES: Mapping[str, Any] = {
    "zero_optimization.stage": "zero", "gradient_clipping": "max_grad_norm", "fp16.enabled": torch.float16,
    "bf16.enabled": torch.bfloat16, "zero_optimization.offload_optimizer.device": OFFLOAD,
}  # fmt: skip
"""Keys that can say no, and to what: an argument, or one of its values."""
AUTO, SILENT = "auto", (None, 0, "auto")
"""A level of ZeRO that is to be chosen; what says nothing."""
SCALE = ("fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis")


@dataclass(frozen=True)
class Choices:
    """What a configuration asks for, in the words of ``auto_parallel``; None where it says nothing."""

    batch: int
    """Samples in a step, over all replicas."""
    micro_batches: int | None
    """Of each replica in a step."""
    max_grad_norm: float | None
    clips: bool
    """Whether it says something of clipping itself."""
    zero: int | str
    zero_backend: str | None
    precision: Precision | None
    optimizer: Factory | None
    rate: Rate | None
    decided: tuple[str, ...]
    """Keys that tune DeepSpeed: they change no number, and the engine decides such things itself."""
    off: Mapping[Any, str]
    """What it says no to: an argument, or one of its values, to the key."""
    scales: bool
    """Whether it says something of the loss scale itself."""

    def tell(self) -> None:
        """Warn, on rank 0, of keys that only tune DeepSpeed."""
        if self.decided and rank() == 0:
            keys = ", ".join(self.decided)
            warnings.warn(
                f"ds_config: {keys} tune DeepSpeed and change no number; the engine decides such things itself",
                stacklevel=4,
            )

    def over(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``auto_parallel`` with what the configuration says of them.

        A precision by its name leaves the loss scale to the configuration; a level of ZeRO of "auto" stays to be chosen
        where no stage is said. Raises ValueError where both say different
        things, also where the configuration says no to what an argument asks for.
        """
        said = {name: getattr(self, name) for name in ARGUMENTS}
        if not self.clips and given["max_grad_norm"] is not None:
            said["max_grad_norm"] = given["max_grad_norm"]
        named = given["precision"]
        given = {**given, "precision": precision_of(named) if named else None}
        if self.precision and named and self.precision.compute == given["precision"].compute:
            if isinstance(named, str):
                given["precision"] = self.precision
            elif not self.scales:
                said["precision"] = named
        both = [
            f"{name} = {value!r}, not {said[name]!r}"
            for name, value in given.items()
            if value not in SILENT and said[name] not in SILENT and value != said[name]
        ]
        both += [
            f"{name} = {value!r}, but {key} says no"
            for name, value in given.items()
            if value not in SILENT and said[name] in SILENT
            if (key := self.off.get(name) or self.off.get(getattr(value, "compute", value)))
        ]
        if both:
            raise ValueError(f"the arguments and ds_config say different things: {'; '.join(both)}; say it once")
        given = {name: 0 if value == AUTO and name in self.off else value for name, value in given.items()}
        return {name: value if said[name] in SILENT else said[name] for name, value in given.items()}


ARGUMENTS = ("optimizer", "rate", "micro_batches", "max_grad_norm", "precision", "zero", "zero_backend")


def arguments(
    config: Mapping[str, Any] | str | Path, degrees: Mapping[str, int | None], samples: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """These arguments of ``auto_parallel`` as the configuration has them; "auto" stands for what is given.

    What only tunes DeepSpeed is named in a warning. Raises ValueError as ``read`` does, and for degrees to be chosen.
    """
    if None in degrees.values():
        raise ValueError("ds_config counts batches by replicas: give dp, pp and tp as numbers, not 'auto'")
    precision = precision_of(given["precision"]).compute
    auto = {
        "train_batch_size": samples, "gradient_accumulation_steps": given["micro_batches"],
        "gradient_clipping": given["max_grad_norm"] or 0, "zero_optimization.stage": given["zero"],
        "fp16.enabled": precision == torch.float16, "bf16.enabled": precision == torch.bfloat16,
    }  # fmt: skip
    choices = read(config, dp=degrees["dp"] or 1, tp=degrees["tp"] or 1, samples=samples, auto=auto)
    choices.tell()
    return choices.over(given)


def read(
    config: Mapping[str, Any] | str | Path, *, dp: int, tp: int = 1, samples: int, auto: Mapping[str, Any] | None = None
) -> Choices:
    """Read a configuration for a job of ``dp`` replicas and batches of ``samples``.

    ``auto`` gives what "auto" stands for, by dotted key. Raises ValueError naming every key that is unknown or cannot
    be honoured, every "auto" that nothing tells the value of, and batch sizes that do not fit together.
    """
    given = loaded(config)
    honoured, decided = settled(given)
    told = dict(auto or {})
    counts = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {key: told.get(key) if value == "auto" else value for key, value in honoured.items()}
    missing = [key for key, value in values.items() if value is None and honoured[key] == "auto" and key not in counts]
    if missing:
        raise ValueError(
            f"'auto' stands for nothing here: {', '.join(missing)}; write the value, or pass it as auto={{key: value}}"
        )
    if values.get("tensor_parallel.autotp_size") not in (None, 0, tp):
        raise ValueError(
            f"tensor_parallel.autotp_size = {values['tensor_parallel.autotp_size']}, but tp = {tp}: say it once, as tp="
        )
    if values.get(counts[0]) is None and "auto" in [honoured.get(key) for key in counts]:
        values[counts[0]] = samples  # what is derived is derived from the batch
    batch, micro_batches = _batch([values.get(key) for key in counts], dp, samples)
    zero, backend = _zero(values)
    clip = float(values.get("gradient_clipping", CLIPPING) or 0.0)
    return Choices(
        batch, micro_batches, clip or None, "gradient_clipping" in values, zero, backend, _precision(values),
        _optimizer(values, backend), _rate(values), decided, _off(values),
        any(key in values for key in SCALE),
    )  # fmt: skip


def loaded(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The configuration itself, or what its file has. Raises ValueError for a file that has none."""
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise ValueError(f"there is no DeepSpeed configuration {str(path)!r}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold keys and values, but a {type(found).__name__}")
    return found


def _batch(counts: list[Any], dp: int, samples: int) -> tuple[int, int | None]:
    """Samples of a step, and micro-batches: DeepSpeed's rule is batch = micro-batch * accumulation * replicas."""
    whole, micro, steps = (None if count is None else int(count) for count in counts)
    if any(count is not None and count < 1 for count in (whole, micro, steps)):
        raise ValueError(f"batch sizes and accumulation are at least 1, not {[whole, micro, steps]}")
    batch = whole if whole is not None else micro * (steps or 1) * dp if micro is not None else samples
    if steps is None and micro is not None:
        steps = batch // (micro * dp) or 1
    elif steps is None and whole is not None:
        steps = 1
    parts = (micro or -(-batch // ((steps or 1) * dp))) * (steps or 1) * dp
    if (micro is not None or whole is not None) and parts != batch:
        raise ValueError(
            f"train_batch_size = {batch} is not train_micro_batch_size_per_gpu * gradient_accumulation_steps * dp = "
            f"{micro if micro is not None else 'a whole number'} * {steps} * {dp}"
        )
    if batch != samples:
        raise ValueError(
            f"the configuration trains on {batch} samples a step (dp={dp}), but the example has {samples}: "
            f"make batches of {batch}, or change train_batch_size"
        )
    return batch, steps


def _zero(values: Mapping[str, Any]) -> tuple[int | str, str | None]:
    level = values.get("zero_optimization.stage", 0)
    offload = values.get("zero_optimization.offload_optimizer.device") == "cpu"
    if not offload:
        return level, None
    if level != 1:
        raise ValueError(
            f"zero_optimization.stage = {level} with offload_optimizer: the optimizer's state goes to the CPU at stage "
            f"1 only; use stage 1 with it, or stage {level} without offload_optimizer"
        )
    return level, OFFLOAD


def _off(values: Mapping[str, Any]) -> dict[Any, str]:
    return {what: key for key, what in SWITCHES.items() if key in values and values[key] in (0, None, "none")}


def _precision(values: Mapping[str, Any]) -> Precision | None:
    half, brain = bool(values.get("fp16.enabled")), bool(values.get("bf16.enabled"))
    if half and brain:
        raise ValueError("fp16.enabled and bf16.enabled are both true: choose one")
    if brain:
        return Precision(torch.bfloat16)
    if not half:
        return None
    fixed = float(values.get("fp16.loss_scale", 0))
    if fixed:
        return Precision(torch.float16, loss_scale=fixed, interval=None)
    return Precision(
        torch.float16, loss_scale=2.0 ** values.get("fp16.initial_scale_power", 16),
        interval=values.get("fp16.loss_scale_window", 1000), patience=values.get("fp16.hysteresis", 2),
    )  # fmt: skip


def _optimizer(values: Mapping[str, Any], backend: str | None) -> Factory | None:
    params = _section(values, "optimizer.params.")
    kind = values.get("optimizer.type")
    if kind is None:
        return None
    torch_adam, decoupled = params.pop("torch_adam", False), params.pop("adam_w_mode", True)
    name = str(kind).lower()
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.type = {kind!r}: it is Adam, AdamW or SGD; for another leave it out and pass optimizer="
        )
    if strange := sorted(params.keys() - set(OPTIMIZERS[name])):
        raise ValueError(f"optimizer.params of {kind} has not {', '.join(strange)}: leave them out")
    if name == "sgd":
        return partial(torch.optim.SGD, **({"lr": 1e-3} | params))
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    decoupled = decoupled or name == "adamw"
    params = {"lr": 1e-3, "weight_decay": 0.01 if torch_adam and decoupled else 0.0} | params  # DeepSpeed's defaults
    if backend == OFFLOAD and not torch_adam and values.get("zero_force_ds_cpu_optimizer", True):
        return partial(cpu_adam, adamw_mode=decoupled, **params)
    return partial(torch.optim.AdamW if decoupled else torch.optim.Adam, **params)


def _rate(values: Mapping[str, Any]) -> Rate | None:
    kind = values.get("scheduler.type")
    return None if kind is None else rate_of(kind, _section(values, "scheduler.params."))


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {key.removeprefix(section): value for key, value in values.items() if key.startswith(section)}
