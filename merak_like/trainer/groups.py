"""Which weights decay, and the optimizer of this rank's parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from merak_like.runtime.methods.flat_adamw import FlatAdamW
from merak_like.trainer.settings import Optimizer

NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names of parameters that transformers' Trainer leaves out of weight decay, besides those of ``nn.LayerNorm``."""


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: all but biases and the weights of norms."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not NOT_DECAYED.search(name) and not (norms and name.startswith(norms))
    }


def optimizer_factory(model: nn.Module, asked: Optimizer) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """What ``auto_parallel`` calls with this rank's parameters."""

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        own = list(parameters)
        names = decayed(model)
        with_decay = {id(p) for name, p in model.named_parameters() if asked.decay_all or name in names}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in own if id(p) in with_decay], "weight_decay": asked.weight_decay},
            {"params": [p for p in own if id(p) not in with_decay], "weight_decay": 0.0},
        ]
        if asked.name == "sgd":
            return torch.optim.SGD(groups, lr=asked.lr, momentum=asked.betas[0])
        if asked.flat:
            return FlatAdamW(groups, asked.lr, betas=asked.betas, eps=asked.eps)
        kind = torch.optim.AdamW if asked.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=asked.lr, betas=asked.betas, eps=asked.eps)

    return make
