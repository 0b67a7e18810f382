"""What the two clients have: parts of Python's own documentation, as word numbers, always the same for a step.

``ann`` and ``bob`` are what edge.yaml names: a batch and its samples' ids for a step. Each has 64 samples of her and
his own; what ``unseen`` gives nobody trains on.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pydoc_data import topics

import torch
from torch import Tensor

TOPICS = ("specialnames", "compound", "typesseq", "types")
TOKENS, WORDS, BATCH, SAMPLES = 32, 800, 16, 64
Batch = dict[str, Tensor]


@cache
def samples() -> tuple[Tensor, Tensor]:
    """Texts of ``TOKENS`` words, shuffled: (samples, TOKENS), and which topic each is from."""
    words = {topic: re.findall(r"\w+|[^\w\s]", topics.topics[topic].lower()) for topic in TOPICS}
    counted = Counter(word for text in words.values() for word in text)
    number = {word: 2 + i for i, (word, _) in enumerate(counted.most_common(WORDS - 2))}
    found, labels = list[list[int]](), list[int]()
    for label, topic in enumerate(TOPICS):
        ids = [number.get(word, 1) for word in words[topic]]
        for start in range(0, len(ids) - TOKENS, TOKENS):
            found.append(ids[start : start + TOKENS])
            labels.append(label)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found)[order], torch.tensor(labels)[order]


def batch(chosen: Tensor, *, classify: bool) -> Batch:
    """For a classifier with topics as labels, for a language model with the text itself."""
    texts, labels = (every[chosen] for every in samples())
    return {
        "input_ids": texts,
        "attention_mask": torch.ones_like(texts),
        "labels": labels if classify else texts.clone(),
    }


def unseen(*, classify: bool) -> list[Batch]:
    """Batches of what neither client has."""
    first = 2 * SAMPLES
    count = min(8, (len(samples()[0]) - first) // BATCH)
    return [batch(torch.arange(first + i * BATCH, first + (i + 1) * BATCH), classify=classify) for i in range(count)]


def _of(client: int, step: int, *, classify: bool) -> tuple[Batch, list[int]]:
    chosen = client * SAMPLES + (step * BATCH + torch.arange(BATCH)) % SAMPLES
    return batch(chosen, classify=classify), chosen.tolist()


def bert_ann(step: int) -> tuple[Batch, list[int]]:
    """Ann's texts and their topics."""
    return _of(0, step, classify=True)


def bert_bob(step: int) -> tuple[Batch, list[int]]:
    """Bob's."""
    return _of(1, step, classify=True)


def gpt2_ann(step: int) -> tuple[Batch, list[int]]:
    """Ann's texts."""
    return _of(0, step, classify=False)


def gpt2_bob(step: int) -> tuple[Batch, list[int]]:
    """Bob's."""
    return _of(1, step, classify=False)
