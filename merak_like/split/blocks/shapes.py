"""Of which shapes passes are, and what everybody makes of a pass's numbers without being sent it.

A trace is of one shape, so passes have few: tokens are filled up on the right to a power of two, and the room they look
at doubles. What is filled up is written nowhere and looked at by no token; only real tokens travel.

    room    0 ..... pads | cached ............ | start .. start + tokens | filled up, not written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TOKENS = 512
"""Of one pass, of all samples together where each has several; longer prompts take several passes."""
GRAIN = 64
"""Least tokens of room, and what room is rounded up to."""


@dataclass(frozen=True)
class Shape:
    """Of a pass: samples, tokens filled up, tokens of room."""

    batch: int
    tokens: int
    width: int


def roomy(length: int) -> int:
    """Tokens of room for texts of a length."""
    return -(-length // GRAIN) * GRAIN


def shape_of(batch: int, start: int, tokens: int, length: int) -> Shape:
    """The shape of a pass over ``tokens`` behind ``start`` ones, in texts of at most ``length``."""
    width = GRAIN
    while width < start + tokens:
        width *= 2
    return Shape(batch, 1 << (tokens - 1).bit_length(), min(width, roomy(length)))


def most_tokens(batch: int) -> int:
    """Of each sample in one pass."""
    return max(1, MOST_TOKENS // batch)


def message_bytes(batch: int, token: int) -> int:
    """Most bytes of a message of values, ``token`` bytes for each token of a sample, as they are or coded."""
    return 2 * batch * most_tokens(batch) * token + 2**16


def chunks(batch: int, tokens: int) -> list[tuple[int, int]]:
    """First and behind the last token of each pass over so many of each sample."""
    most = most_tokens(batch)
    return [(at, min(at + most, tokens)) for at in range(0, tokens, most)]


def blank(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """A pass without content, to trace."""
    ids = torch.zeros(shape.batch, shape.tokens, dtype=torch.long)
    mask = torch.zeros(shape.batch, 1, shape.tokens, shape.width, dtype=dtype)
    return {"input_ids": ids, "position_ids": ids.clone(), "attention_mask": mask, "last": torch.zeros(1).long()}


def given(shape: Shape, pads: Sequence[int], start: int, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Positions, mask and last token of a pass; ``pads`` are the tokens of padding in front of each sample."""
    front = torch.tensor(pads)[:, None]
    at = start + torch.arange(shape.tokens).clamp(max=tokens - 1)[None, :]
    key = torch.arange(shape.width)
    # Padding looks at itself, so that its softmax is one of something.
    seen = (key <= at[..., None]) & (key >= front[..., None]) | (key == at[..., None])
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    positions = (at - front).clamp(min=0)
    return {"position_ids": positions, "attention_mask": mask, "last": torch.tensor([tokens - 1])}


def filled(x: Tensor, tokens: int) -> Tensor:
    """(batch, some tokens, ...) filled up with zeros to so many tokens."""
    if x.shape[1] == tokens:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], tokens - x.shape[1], *x.shape[2:])], 1)
