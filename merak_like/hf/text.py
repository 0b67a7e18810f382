"""Tokenizers, for those who must not know transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import AutoTokenizer


@dataclass(frozen=True)
class Tokenizer:
    """What a run needs of a tokenizer."""

    inner: Any
    end: int | None
    """The token that ends a document."""
    pad: int
    vocabulary: int
    _one_at_a_time: Lock = field(default_factory=Lock, repr=False, compare=False)
    """A batch is made ahead while another is evaluated, and ``inner`` is changed by each call."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token numbers, nothing added: a document is only its text."""
        return self.inner(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def whole(self, texts: list[str], most: int) -> list[dict[str, Any]]:
        """Each text as the model was taught to read one: with its special tokens, cut at ``most``."""
        with self._one_at_a_time:
            made = self.inner(texts, truncation=True, max_length=most)
        return [{key: made[key][i] for key in made} for i in range(len(texts))]

    def decode(self, tokens: list[int]) -> str:
        """Token numbers as text, without special tokens."""
        return self.inner.decode(tokens, skip_special_tokens=True)

    def save_pretrained(self, folder: Path) -> None:
        """Write it beside a model."""
        self.inner.save_pretrained(folder)


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder. Raises ValueError where there is none."""
    try:
        made: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read: {' '.join(str(error).split())}"
        ) from None
    end = made.eos_token_id if made.eos_token_id is not None else made.sep_token_id
    pad = made.pad_token_id if made.pad_token_id is not None else end
    return Tokenizer(made, end, pad or 0, len(made))
