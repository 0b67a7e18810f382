"""The loss on other data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.batches import rows
from merak_like.runtime.engine import Engine
from merak_like.trainer.data.collate import Collate
from merak_like.trainer.data.loader import Samples


def evaluated(engine: Engine, data: Samples, collate: Collate, batch: int, most: int | None = None) -> dict[str, float]:
    """``eval_loss``, the mean over all items of all batches, and for language models ``eval_perplexity``."""
    loss, items = 0.0, 0
    starts = range(0, len(data), batch)[:most]
    for start in starts:
        made = collate([data[i] for i in range(start, min(start + batch, len(data)))])
        full, times = enough(made, engine.plan.mesh.dp * engine.plan.micro_batches)
        result = engine.evaluate(full)
        loss, items = loss + result.loss * (result.tokens // times), items + result.tokens // times
    if not items:
        raise ValueError("the data to evaluate on is empty")
    numbers = {"eval_loss": loss / items}
    if counts_tokens(engine):
        numbers["eval_perplexity"] = math.exp(min(loss / items, 700.0))
    return numbers


def enough(batch: Any, parts: int) -> tuple[Any, int]:
    """A batch of at least ``parts`` rows, and how often each row is in it: repeating all leaves every mean as it is."""
    size = rows(batch)
    times = -(-parts // size)
    return (batch, 1) if times == 1 else (_repeated(batch, size, times), times)


def _repeated(item: Any, size: int, times: int) -> Any:
    if isinstance(item, Tensor):
        return torch.cat([item] * times) if item.dim() and item.shape[0] == size else item
    if isinstance(item, Mapping):
        return {key: _repeated(value, size, times) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(_repeated(value, size, times) for value in item)
    return item


def counts_tokens(engine: Engine) -> bool:
    """Whether the model's loss is a mean over tokens, so that its exponential is a perplexity."""
    if not hasattr(engine.model, "config"):
        return False
    from merak_like import hf

    return hf.loss_weight(engine.model) is not None
