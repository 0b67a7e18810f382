"""What a zoo entry is, and the batches entries share. A batch is the same in every call: no global RNG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]  # keyword arguments of the model's forward; tensors but for flags such as CLIP's return_loss
VOCAB = 100
PAD, BOS, EOS = 0, 1, 2
MASK, IMAGE = 3, 4  # "guess this one"; "a piece of the image stands here"
FIRST_TOKEN = 5  # ids below are special and never drawn


@dataclass(frozen=True)
class Case:
    """`build()` gives a model in train mode (seed torch first), `batch(size)` its arguments, labels included."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    kind: str = "decoder"
    attentions: tuple[str, ...] = ()  # the attn_implementation values it can be built with; () where there is no choice
    reads_values: str = ""  # where forward looks into its inputs' values, so that fake tensors are not enough
    attention: str | None = None  # the one it is built with; None leaves the choice to transformers
    _make: Callable[[str | None], nn.Module] | None = field(default=None, repr=False, compare=False)

    def with_attention(self, attention: str) -> Case:
        """The same case with that attention kernel, named `name[attention]`."""
        if attention not in self.attentions or self._make is None:
            raise ValueError(f"{self.name} has no attention {attention!r}; it has {list(self.attentions)}")
        make = self._make
        return replace(
            self, name=f"{self.name}[{attention}]", attention=attention, build=lambda: make(attention).train()
        )


def mean_square(output: Any, batch: Batch | None = None) -> Tensor:
    """A loss for a model that computes none: of a tensor, or of every floating tensor in a dict or sequence."""
    if isinstance(output, Tensor):
        return output.abs().square().mean()
    values = output.values() if isinstance(output, dict) else output
    return torch.stack([mean_square(value) for value in values]).sum()


@dataclass(frozen=True)
class Toy:
    """A plain module with the loss `loss_fn(model(**batch), batch)`; `refused`: why tracing it must raise."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    loss_fn: Callable[[Any, Batch], Tensor] = mean_square
    refused: str = ""
    reads_values: str = ""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(size: int, length: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(FIRST_TOKEN, vocab, (size, length), generator=generator(seed))


def pad_right(ids: Tensor, padding: int = 3) -> tuple[Tensor, Tensor]:
    """Every second sample ends in `padding` pads: (ids, attention_mask)."""
    mask = torch.ones_like(ids)
    mask[1::2, -padding:] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def causal_lm(size: int = 2, length: int = 14, vocab: int = VOCAB) -> Batch:
    ids, mask = pad_right(tokens(size, length, vocab))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked_lm(size: int = 2, length: int = 14, vocab: int = VOCAB) -> Batch:
    ids, mask = pad_right(tokens(size, length, vocab))
    asked = (torch.arange(length) % 3 == 1) & (mask == 1)
    return {"input_ids": ids.masked_fill(asked, MASK), "attention_mask": mask, "labels": ids.masked_fill(~asked, -100)}


def classification(size: int = 2, length: int = 14, vocab: int = VOCAB) -> Batch:
    ids, mask = pad_right(tokens(size, length, vocab))
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(size) % 2}


def seq2seq(size: int = 2, length: int = 14, target: int = 10, vocab: int = VOCAB) -> Batch:
    ids, mask = pad_right(tokens(size, length, vocab))
    answer, answer_mask = pad_right(tokens(size, target, vocab, seed=1))
    return {"input_ids": ids, "attention_mask": mask, "labels": answer.masked_fill(answer_mask == 0, -100)}


def pixels(size: int, side: int, seed: int = 2) -> Tensor:
    return torch.randn(size, 3, side, side, generator=generator(seed))


def images(size: int = 2, side: int = 32) -> Batch:
    return {"pixel_values": pixels(size, side), "labels": torch.arange(size) % 2}


def segmentation(size: int = 2, side: int = 32, classes: int = 4) -> Batch:
    labels = torch.randint(0, classes, (size, side, side), generator=generator(3))
    return {"pixel_values": pixels(size, side), "labels": labels}


def image_and_text(size: int = 2, side: int = 32, length: int = 10) -> Batch:
    ids = tokens(size, length)
    ids[:, -1] = EOS
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(size, side),
        "return_loss": True,
    }


def image_in_text(size: int = 2, side: int = 32, pieces: int = 16, length: int = 10, nested: bool = False) -> Batch:
    """Text with one image in it: `pieces` IMAGE tokens, which the model replaces by what it sees."""
    batch = causal_lm(size, length)
    start = torch.tensor([[BOS] + [IMAGE] * pieces]).expand(size, -1)
    image = pixels(size, side)
    return {
        "input_ids": torch.cat([start, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(start), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(start, -100), batch["labels"]], 1),
        "pixel_values": image[:, None] if nested else image,
    }


def patches_in_text(size: int = 2, grid: int = 4, patch: int = 8, length: int = 10) -> Batch:
    """The same as Qwen2-VL wants it: all images' patches in one matrix, four patches (two frames each) to a token."""
    batch = image_in_text(size, 8, grid * grid // 4, length)
    batch["pixel_values"] = torch.randn(size * grid * grid, 3 * 2 * patch * patch, generator=generator(2))
    batch["image_grid_thw"] = torch.tensor([[1, grid, grid]]).expand(size, -1)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


def speech_features(size: int = 2, mels: int = 16, frames: int = 32, target: int = 10) -> Batch:
    features = torch.randn(size, mels, frames, generator=generator(4))
    answer, mask = pad_right(tokens(size, target, seed=1))
    return {"input_features": features, "labels": answer.masked_fill(mask == 0, -100)}


def waveform(size: int = 2, samples: int = 640, target: int | None = None) -> Batch:
    """With `target` the labels are a CTC target, without they are classes."""
    sound, mask = torch.randn(size, samples, generator=generator(5)), torch.ones(size, samples, dtype=torch.long)
    mask[1::2, -samples // 4 :] = 0
    labels = torch.arange(size) % 2
    if target is not None:
        answer, answer_mask = pad_right(tokens(size, target, 32, seed=1), 2)
        labels = answer.masked_fill(answer_mask == 0, -100)
    return {"input_values": sound * mask, "attention_mask": mask, "labels": labels}
