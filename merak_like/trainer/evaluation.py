"""The loss on other data, and what people measure of a model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merak_like.runtime.batches import enough, rows
from merak_like.runtime.engine import Engine
from merak_like.runtime.predict import predict
from merak_like.trainer.data.collate import IGNORED, Collate
from merak_like.trainer.data.loader import Samples, Share
from merak_like.trainer.reading import EVERYTHING, Reading


class Predictions(NamedTuple):
    """What transformers' Trainer hands to ``compute_metrics``, under the same names."""

    predictions: NDArray[Any]
    """The model's ``logits``, or its first output besides the loss."""
    label_ids: NDArray[Any]


Metrics = Callable[[Any], Mapping[str, float]]
"""From ``Predictions`` to numbers by name; functions written for transformers' Trainer fit."""


def accuracy(made: Predictions) -> dict[str, float]:
    """The share of classes that are right."""
    return {"accuracy": float((made.predictions.argmax(-1) == made.label_ids).mean())}


def evaluated(
    engine: Engine, data: Samples, collate: Collate, batch: int, most: int | None = None,
    metrics: Metrics | None = None, *, stop: Callable[[], bool] = lambda: False, reading: Reading = EVERYTHING,
) -> dict[str, float]:  # fmt: skip
    """``eval_loss``, the mean over all items of all batches; for language models ``eval_perplexity``; and ``metrics``.

    With ``metrics`` every rank gathers all predictions: choose data for which they fit into memory. Nothing is found
    where ``stop()``, asked between batches, says so on every rank. ``reading`` is what each rank loads of a batch.
    """
    reading = reading if metrics is None else EVERYTHING
    share = Share(names=reading.names)
    own = share.samples(data)
    loss, items = 0.0, 0
    made_of: list[tuple[Tensor, Tensor]] = []
    starts = range(0, len(data), batch)[:most]
    for start in starts:
        if stop():
            return {}
        made = None if share.nothing else collate([own[i] for i in range(start, min(start + batch, len(data)))])
        parts = engine.plan.mesh.dp * engine.plan.micro_batches
        full, times = reading.complete(engine, *((None, 1) if made is None else enough(made, parts)))
        if metrics is None:
            result = engine.evaluate(full)
        else:
            result, outputs = predict(engine, full)
            made_of.append(_predicted(outputs, made))
        loss, items = loss + result.loss * (result.tokens // times), items + result.tokens // times
    if not items:
        raise ValueError("the data to evaluate on is empty")
    numbers = {"eval_loss": loss / items}
    if counts_tokens(engine):
        numbers["eval_perplexity"] = math.exp(min(loss / items, 700.0))
    if metrics is not None:
        given = Predictions(*(_joined(tensors) for tensors in zip(*made_of, strict=True)))
        numbers |= {f"eval_{name.removeprefix('eval_')}": float(value) for name, value in metrics(given).items()}
    return numbers


def _predicted(outputs: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch; rows that were repeated to fill it are left out."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, tuple) else None
    if labels is None or not outputs:
        raise ValueError(
            "metrics need labels (batch['labels'], or the last of a tuple) and outputs with a row for each sample; the "
            f"model gives {sorted(outputs) or 'none'}"
        )
    return outputs.get("logits", next(iter(outputs.values())))[: rows(batch)].float(), labels


def _joined(tensors: tuple[Tensor, ...]) -> NDArray[Any]:
    """Batches of different widths are filled up with -100, as transformers does."""
    width = max(tensor.shape[1] if tensor.dim() > 1 else 0 for tensor in tensors)
    filled = [
        torch.cat([t, t.new_full((len(t), width - t.shape[1], *t.shape[2:]), IGNORED)], 1) if t.dim() > 1 else t
        for t in tensors
    ]
    return np.asarray(torch.cat(filled))


def counts_tokens(engine: Engine) -> bool:
    """Whether the model's loss is a mean over tokens, so that its exponential is a perplexity."""
    if not hasattr(engine.model, "config"):
        return False
    from merak_like import hf

    return hf.loss_weight(engine.model) is not None
