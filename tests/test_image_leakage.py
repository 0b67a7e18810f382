"""The report on images finds what is there to be found: nearly all on a wide cut, less on a narrow or coarse one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merak_like.split.half import Source
from merak_like.split.image_leakage import ImageLeakage, image_leakage, images_of, similarity
from merak_like.split.messages import Task
from tests.commands import run

SIDE, BATCH = 8, 32


class Classifier(nn.Module):
    """Is a picture brighter above than below?"""

    def __init__(self, channels: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.front = nn.Conv2d(1, channels, stride + 1, stride=stride, padding=1)
        self.middle = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.LazyLinear(2)
        self(batch(0)["pixel_values"])

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.middle(self.front(pixel_values).tanh()).tanh().flatten(1))
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def batch(step: int) -> dict[str, Tensor]:
    """Bright boxes at random places, on slopes."""
    generator = torch.Generator().manual_seed(step)
    low, size = (torch.randint(*limits, (BATCH, 2, 1, 1), generator=generator) for limits in ((0, 6), (2, 5)))
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    box = ((place >= low) & (place < low + size)).all(1)
    slope = (torch.rand(BATCH, 2, 1, 1, generator=generator) * place).sum(1) / SIDE
    pixels = (box + slope)[:, None].float()
    return {"pixel_values": pixels, "labels": (pixels[:, 0, : SIDE // 2] > 1).sum((1, 2)).gt(3).long()}


def source(**shape: int) -> Source:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Classifier(**shape)

    return Source(build)


BATCHES: list[Any] = [(batch(step), None) for step in range(12)]


def measured(codec: str = "identity", **shape: int) -> ImageLeakage:
    return image_leakage(source(**shape), Task(cut="front:head", codec=codec), BATCHES, steps=100)


@pytest.fixture(scope="module")
def wide() -> ImageLeakage:
    return measured()


def test_a_wide_cut_shows_the_images_and_a_narrow_one_less(wide: ImageLeakage):
    narrow = measured(channels=1, stride=4)
    assert wide.numbers > wide.pixels > narrow.numbers
    assert wide.seen > 0.9
    assert narrow.seen < 0.6
    assert wide.likeness > 0.9 > narrow.likeness > wide.mean_likeness
    assert wide.mean_error == narrow.mean_error
    assert wide.images == 3 * BATCH
    assert "can see nearly all of what sets an image apart" in str(wide)
    assert not any(word in str(each).lower() for each in (wide, narrow) for word in ("private", "safe"))


def test_a_coarse_codec_shows_less(wide: ImageLeakage):
    assert measured("sign").seen < wide.seen


def test_labels_are_found_beside_the_images(wide: ImageLeakage):
    assert wide.labels is not None
    assert wide.labels.found > 0.9  # a head of one layer tells them by its gradient
    assert "of the labels are found" in str(wide)


def test_batches_without_images_are_refused():
    with pytest.raises(ValueError, match="four or more batches"):
        image_leakage(source(), Task(cut="front:head"), BATCHES[:3])
    assert images_of({"input_ids": torch.zeros(2, 3, dtype=torch.long)}) is None
    assert images_of({"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(2, 1, 4, 4)}) is None


def test_similarity_is_one_for_the_same_and_less_for_what_is_off():
    x = batch(0)["pixel_values"]
    off = [similarity(x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x, 2.0)
           for scale in (0.0, 0.1, 0.5)]  # fmt: skip
    assert off[0] == pytest.approx(1.0)
    assert off[0] > off[1] > off[2]


YAML = """
model: tests.test_image_leakage:built
data: tests.test_image_leakage:batch
cut: front:head
steps: 8
"""


def built() -> tuple[nn.Module, Any]:
    return source().build(), batch(0)


@pytest.mark.slow
def test_the_command_draws_images_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "edge.yaml").write_text(YAML)
    said = run(capsys, "edge", "leakage", str(tmp_path / "edge.yaml"))
    assert "unseen images again" in said


@pytest.mark.slow
def test_digits_behind_a_layer_of_a_vision_transformer_can_be_seen():
    """Of 8 x 8 pixels, in patches of 2 x 2, with a token of the whole image in front of them."""
    transformers = pytest.importorskip("transformers")
    data = pytest.importorskip("sklearn.datasets").load_digits()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts: list[Any] = [({"pixel_values": x[some], "labels": y[some]}, None) for some in order.split(64)[:24]]

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)

    layer = next(name for name, _ in build().named_modules() if name.endswith(("layer.0", "layers.0")))
    found = image_leakage(Source(build), Task(cut=f"{layer}:classifier"), parts)
    print(found)
    assert found.seen > 0.8
    assert found.likeness > 0.7 > found.mean_likeness
