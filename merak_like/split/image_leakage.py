"""How much of its images whoever reads the wire can see again: measured on the owner's data, as for text (leakage.py).

A decoder is trained to draw each image from what the edge would send for it, on some batches, and asked on others.
Beside it stands what nobody needs the wire for: the mean image. Both are told as mean squared error and as structural
similarity (Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", sec. III.B).
It is a lower bound: with more images, a larger decoder, or one that knows what images look like, more is seen.

    sent, (b, c, h, w) or (b, patches, width) or (b, n) --> a map --> convolutions --> pixels of each place of the map
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merak_like.runtime.batches import rows
from merak_like.runtime.links import Spec
from merak_like.split.half import Source
from merak_like.split.leakage import Labels, distance_correlation, kept_back, labels_found, overhear
from merak_like.split.messages import Task
from merak_like.split.screen import Screen

WIDTH = 64
"""Of the decoder."""
WINDOW = 7
"""Side of the squares in which similarity is counted, as far as an image has so many pixels."""


@dataclass(frozen=True)
class ImageLeakage:
    """How near the decoder's images come to unseen ones."""

    error: float
    """Mean squared error, in the pixels' own units."""
    mean_error: float
    """The same for always drawing the mean image."""
    likeness: float
    """Structural similarity, 1: the same image."""
    mean_likeness: float
    """The same for the mean image."""
    correlation: float
    """Distance correlation between the images and what is sent; 0: independent."""
    numbers: int
    """Numbers an image that are sent."""
    pixels: int
    """Numbers an image has."""
    images: int
    """Images asked for."""
    labels: Labels | None = None
    """None: there is not one a sample."""

    @property
    def seen(self) -> float:
        """The share of how images differ from their mean that the decoder draws, 0 to 1."""
        return max(0.0, 1 - self.error / self.mean_error) if self.mean_error else 0.0

    def __str__(self) -> str:
        judged = "nearly all" if self.seen > 0.9 else "most" if self.seen > 0.5 else "some"
        return (
            f"a decoder draws {self.images} unseen images again with a mean squared error of {self.error:.4g} (always "
            f"the mean image: {self.mean_error:.4g}) and a likeness of {self.likeness:.2f} ({self.mean_likeness:.2f}), "
            f"from {self.numbers} numbers for {self.pixels} pixels; distance correlation {self.correlation:.2f}. "
            f"Whoever reads what is sent can see {judged} of what sets an image apart; a better decoder sees more."
            f"{f' {self.labels}' if self.labels is not None else ''}"
        )


def images_of(batch: Any) -> str | None:
    """The batch's one value that is an image a sample, (b, channels, h, w); None where there is not one."""
    found = [
        name for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim() == 4 and value.dtype.is_floating_point
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def image_leakage(
    source: Source,
    task: Task,
    batches: Sequence[tuple[Any, Sequence[int] | None]],
    *,
    steps: int = 400,
    seed: int = 0,
    screen: Screen | None = None,
) -> ImageLeakage:
    """Measure on some batches, each with its samples' ids or None; the last quarter is kept for asking.

    No host is needed. Raises ValueError for batches without images, fewer than four, or a cut that sends more than one
    value of a row an image.
    """
    name = images_of(batches[0][0]) if batches else None
    if len(batches) < 4 or name is None:
        raise ValueError(
            "a report on images needs four or more batches, each with one value of (samples, channels, height, width); "
            f"found {len(batches)}"
        )
    heard = overhear(source, task, batches, _a_row_an_image, seed, screen)
    asked = kept_back(len(batches))
    images = [batch[name].float() for batch, _ in batches]
    x, x_new = torch.cat(images[:-asked]), torch.cat(images[-asked:])
    z, z_new = (torch.cat(part).float() for part in (heard.arrived[:-asked], heard.arrived[-asked:]))
    mean = x.mean(0, keepdim=True)
    drawn = _drawn(z, x - mean, z_new, steps, seed) + mean
    blank = mean.expand_as(x_new)
    span = float(x.max() - x.min())
    return ImageLeakage(
        float(F.mse_loss(drawn, x_new)), float(F.mse_loss(blank, x_new)), similarity(drawn, x_new, span),
        similarity(blank, x_new, span), distance_correlation(x_new[:600].flatten(1), z_new[:600].flatten(1)),
        z[0].numel(), x[0].numel(), len(x_new), labels_found(heard, steps, seed),
    )  # fmt: skip


def _a_row_an_image(batch: Any, sent: Sequence[Spec]) -> Spec:
    found = [s for s in sent if s.dtype.is_floating_point and s.shape[:1] == (rows(batch),) and len(s.shape) > 1]
    if len(found) != 1:
        raise ValueError(f"the cut sends {[s.shape for s in sent]}: no single value has a row an image")
    return found[0]


def _map(z: Tensor) -> Tensor:
    """What was sent as (b, channels, h, w): a map as it is, patches in their square, all else in one place.

    Patches may be behind a token of the whole image, which every place then gets.
    """
    if z.dim() == 4:
        return z
    if z.dim() == 3:
        for extra in (0, 1):
            side = math.isqrt(z.shape[1] - extra)
            if side and side * side + extra == z.shape[1]:
                square = z[:, extra:].transpose(1, 2).unflatten(2, (side, side))
                whole = z[:, :extra].transpose(1, 2).unsqueeze(3).expand(-1, -1, side, side)
                return torch.cat([square, whole], 1) if extra else square
    return z.flatten(1)[:, :, None, None]


def _drawn(z: Tensor, x: Tensor, z_new: Tensor, steps: int, seed: int) -> Tensor:
    """Images of ``z_new`` by a decoder that has learnt those of ``z``; both without their mean."""
    z, z_new = _map(z), _map(z_new)
    mean, scale = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True) + 1e-6
    z, z_new, size = (z - mean) / scale, (z_new - mean) / scale, x.shape[1:]
    spread = x.std() + 1e-6
    finer = max(1, *(-(-whole // part) for whole, part in zip(size[1:], z.shape[2:], strict=True)))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = nn.Sequential(
            nn.Conv2d(z.shape[1], WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU(),
            nn.Conv2d(WIDTH, size[0] * finer * finer, 1), nn.PixelShuffle(finer),
        )  # fmt: skip

    def draw(some: Tensor) -> Tensor:
        return F.interpolate(decoder(some), size[1:], mode="bilinear", align_corners=False)

    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(steps):
        some = torch.randint(len(z), (min(32, len(z)),), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(draw(z[some]), x[some] / spread).backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([draw(part) for part in z_new.split(256)]) * spread


def similarity(x: Tensor, y: Tensor, span: float) -> float:
    """Mean structural similarity of two sets of images (b, channels, h, w) whose pixels span so much."""
    side = min(WINDOW, *x.shape[2:])

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, stride=1)

    x, y = x.double(), y.double()
    a, b = mean(x), mean(y)
    one, two = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * a * b + one) * (2 * (mean(x * y) - a * b) + two)
    bottom = (a * a + b * b + one) * (mean(x * x) - a * a + mean(y * y) - b * b + two)
    return float((top / bottom.clamp(min=1e-30)).mean())
