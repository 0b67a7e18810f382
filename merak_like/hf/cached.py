"""A causal language model with room for keys and values, as a module that can be traced.

Each layer gives its new keys and values to a ``Slot`` and attends to what the slot gives back: those of all tokens so
far. A slot is a module without weights, so a trace shows where each layer's cache is used, and whoever runs a piece of
the trace decides where its memory is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from merak_like.hf import _positions

Store = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Takes new keys and values (batch, heads, tokens, size), gives all of them, ``width`` tokens of room."""
NEEDED = ("input_ids", "position_ids", "attention_mask", "past_key_values")


class Slot(nn.Module):
    """One layer's place for keys and values."""

    store: Store | None = None

    def forward(self, keys: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """All keys and values; without a store, room for as many."""
        if self.store is not None:
            return self.store(keys, values, width)
        (batch, heads, _, size), deep = keys.shape, values.shape[-1]
        return keys.new_zeros(batch, heads, width, size), values.new_zeros(batch, heads, width, deep)


class _Layer:
    """What transformers' attention takes for a layer's cache: positions and masks are given, never asked for."""

    is_compileable = is_sliding = False

    def __init__(self, slot: Slot, width: int) -> None:
        self.slot, self.width = slot, width

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.slot(keys, values, self.width)

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0


class _Layers(transformers.Cache):
    """All of them."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer: Any = self.layers[layer_idx]
        return layer.get_mask_sizes(query_length)


class Cached(nn.Module):
    """``forward(input_ids, position_ids, attention_mask, last)`` -> ``{"logits": (batch, 1, words)}``.

    input_ids, position_ids (batch, tokens); attention_mask (batch, 1, tokens, width), added to the scores; last (1,),
    the place among the tokens whose logits are wanted.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model that cannot be given a cache, positions and a mask."""
        super().__init__()
        known = inspect.signature(model.forward).parameters
        missing = [name for name in NEEDED if name not in known]
        if missing or not isinstance(model, transformers.PreTrainedModel):
            raise ValueError(
                f"{type(model).__name__} takes no {', '.join(missing) or 'configuration'}: text is generated block by "
                "block with transformers' causal language models that take a cache, positions and a mask"
            )
        self.model = model
        self.short = "logits_to_keep" in known
        self.slots = nn.ModuleList(Slot() for _ in range(model.config.get_text_config().num_hidden_layers))

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, last: Tensor) -> Any:
        """One pass over some tokens, behind those in the slots."""
        layers: Any = [_Layer(slot, attention_mask.shape[-1]) for slot in self.slots]  # pyright: ignore[reportArgumentType]
        found = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask,
            past_key_values=_Layers(layers=layers), use_cache=True,
            **({"logits_to_keep": last} if self.short else {}),
        )  # fmt: skip
        return {"logits": found.logits if self.short else found.logits[:, last]}

    @property
    def longest(self) -> int | None:
        """Most tokens of a text: the model's positions, or the window it looks back; None: any number."""
        text = self.model.config.get_text_config()
        windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
        most = [n for n in (_positions(self.model), *windows) if isinstance(n, int) and n > 0]  # pyright: ignore[reportArgumentType]
        return min(most, default=None)
