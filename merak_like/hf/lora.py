"""LoRA through PEFT: small trained additions to frozen weights (Hu et al., "LoRA", ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    import peft
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"LoRA needs peft, but {error}: pip install 'merak-like[peft]'", name=error.name
    ) from None

from merak_like.runtime.four_bit import quantise
from merak_like.trainer.config import Lora

TASKS: Mapping[str, str] = {
    "SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "TokenClassification": "TOKEN_CLS", "ConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip
"""What PEFT calls the task of a class of transformers whose name ends so; it keeps a new head trained whole."""


def wrap(model: nn.Module, asked: Lora, *, seed: int = 0) -> nn.Module:
    """The model with additions, the same on every rank by ``seed``; all else is frozen, in four bits where it says so.

    The model must have its weights (not be on the meta device). A classifier's new head is trained whole. Raises
    ValueError for targets that match no module.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("LoRA adds to weights that are there, but this model is on the meta device: load it first")
    whole = asked.targets == "all-linear"
    names = asked.targets if whole else [asked.targets] if isinstance(asked.targets, str) else list(asked.targets)
    kind = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    options: dict[str, Any] = {"lora_alpha": asked.alpha, "target_modules": names, "task_type": kind}
    if asked.base != "full":
        quantise(model, asked.base)
    config = peft.LoraConfig(r=asked.r, lora_dropout=asked.dropout, **options)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def merge(base: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Add what was learned to the weights of ``base`` and write a model that needs no PEFT.

    Raises ValueError where ``adapter`` has none.
    """
    from merak_like.hf import pretrained

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} has no adapter_config.json: it is not the folder of a LoRA adapter")
    model = pretrained.load(Path(base), {}, whole=True).model
    merged: Any = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(output)
