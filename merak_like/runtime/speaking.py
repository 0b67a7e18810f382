"""Text from a causal language model that is spread over stages and tensor-parallel ranks.

Every token is one forward of the pipeline over the whole text so far: there is no cache of keys and values, so this is
for looking at what a model says while it trains, not for serving it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from merak_like.runtime.batches import enough
from merak_like.runtime.predict import predict
from merak_like.runtime.sampling import Sampling

if TYPE_CHECKING:
    from merak_like.runtime.engine import Engine

LOOKS_AHEAD = 1e-5
"""Of the largest logit: what changes more, when only later tokens differ, is no rounding."""


class Speaking:
    """The part of an engine that writes."""

    def generate(
        self, prompts: Sequence[Sequence[int]] | Tensor, *, max_new_tokens: int, end: int | None = None,
        pad: int = 0, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Each prompt's tokens with up to ``max_new_tokens`` behind them, or up to and with ``end``. Every rank calls.

        Without a ``temperature`` the likeliest token is taken; else one is drawn, the same on every rank by ``seed``,
        of the ``top_k`` likeliest or of those that have a probability of ``top_p`` together. All texts are filled up to
        one length on the right with ``pad``, so there is one shape and one trace. Raises ValueError for a model that
        gives no ``logits`` or reads ahead, for an empty prompt, and for more tokens than the model has positions.
        """
        texts = [[int(token) for token in prompt] for prompt in prompts]
        if not texts or not all(texts) or max_new_tokens < 1:
            raise ValueError(
                f"generate needs prompts of at least one token and at least one new one, found lengths "
                f"{[len(text) for text in texts]} and max_new_tokens={max_new_tokens}"
            )
        engine = cast("Engine", self)  # which it is a part of
        choose = Sampling(temperature, top_k, top_p, seed)
        width = max(map(len, texts)) + max_new_tokens
        most = getattr(getattr(engine.model, "config", None), "max_position_embeddings", None)
        if isinstance(most, int) and 0 < most < width:
            raise ValueError(
                f"{max_new_tokens} new tokens behind a prompt of {width - max_new_tokens} are {width}, but "
                f"{engine.plan.model} has {most} positions: ask for at most {max(0, most - width + max_new_tokens)}"
            )
        ends = [len(text) + max_new_tokens for text in texts]
        done = [False] * len(texts)
        for turn in range(max_new_tokens):
            logits = _next(engine, texts, width, pad)
            if turn == 0:
                other = _next(engine, texts, width, int(pad == 0))
                if not torch.allclose(logits, other, rtol=0, atol=LOOKS_AHEAD * float(logits.abs().max())):
                    raise ValueError(
                        f"what {engine.plan.model} says next depends on what stands behind a text: generate is for "
                        "causal language models"
                    )
            for row, token in enumerate(choose(logits)):
                if not done[row]:
                    texts[row].append(token)
                    done[row] = token == end or len(texts[row]) == ends[row]
            if all(done):
                break
        return texts


def _next(engine: Engine, texts: Sequence[Sequence[int]], width: int, pad: int) -> Tensor:
    """The logits (texts, words) of what follows each text."""
    ids = torch.tensor([[*text, *[pad] * (width - len(text))] for text in texts])
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    outputs = predict(engine, enough(batch, engine.plan.mesh.dp * engine.plan.micro_batches)[0])[1]
    if "logits" not in outputs:
        raise ValueError(f"{engine.plan.model} gives no logits, but {sorted(outputs)}: it cannot be asked for text")
    last = torch.tensor([len(text) - 1 for text in texts])
    return outputs["logits"][torch.arange(len(texts)), last].float()
