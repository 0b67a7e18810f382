"""Text from a causal language model that is spread over stages.

Every token is one forward of the pipeline over the whole text so far: there is no cache of keys and values, so this is
for looking at what a model says while it trains, not for serving it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merak_like.runtime.engine import Engine
from merak_like.runtime.predict import predict
from merak_like.trainer.evaluation import enough
from merak_like.trainer.sampling import Sampling


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]] | Tensor, *, max_new_tokens: int, end: int | None = None,
    pad: int = 0, temperature: float = 0.0, top_k: int | None = None, seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Each prompt's tokens with up to ``max_new_tokens`` behind them, or up to and with ``end``. Every rank calls.

    Without a ``temperature`` the likeliest token is taken; else one is drawn, the same on every rank by ``seed``. All
    texts are filled up to one length on the right, which a causal model does not look at, so there is one shape and one
    trace. Raises ValueError for a model that gives no ``logits``, and for an empty prompt.
    """
    texts = [[int(token) for token in prompt] for prompt in prompts]
    if not texts or not all(texts):
        raise ValueError("generate needs prompts of at least one token")
    width = max(map(len, texts)) + max_new_tokens
    ends = [len(text) + max_new_tokens for text in texts]
    done = [False] * len(texts)
    choose = Sampling(max(0.0, temperature), top_k, seed=seed)
    for _ in range(max_new_tokens):
        ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
        full, _ = enough({"input_ids": ids, "labels": ids}, engine.plan.mesh.dp * engine.plan.micro_batches)
        _, outputs = predict(engine, full)
        if "logits" not in outputs:
            raise ValueError(f"{engine.plan.model} gives no logits, but {sorted(outputs)}: it cannot be asked for text")
        last = torch.tensor([len(text) - 1 for text in texts])
        logits = outputs["logits"][torch.arange(len(texts)), last].float()
        for row, token in enumerate(choose(logits)):
            if not done[row]:
                texts[row].append(token)
                done[row] = token == end or len(texts[row]) == ends[row]
        if all(done):
            break
    return texts
