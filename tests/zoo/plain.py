"""Plain modules: four architectures whose shape is the difficulty. The toys with one trap each are in traps.py."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import more_traps  # noqa: F401  (fills TRAPS)
from tests.zoo.case import Batch, Toy, generator, pixels
from tests.zoo.traps import TRAPS

CLASSES = 4


def _double_conv(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [
            nn.Conv2d(channels, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Skips as long as the model: what the first block makes, the last one needs."""

    def __init__(self, channels: tuple[int, ...] = (8, 16, 24, 32)) -> None:
        super().__init__()
        self.stem = _double_conv(3, channels[0])
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList([_double_conv(narrow, wide) for narrow, wide in pairs])
        self.up = nn.ModuleList([nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs)])
        self.merge = nn.ModuleList([_double_conv(2 * narrow, narrow) for narrow, _ in reversed(pairs)])
        self.head = nn.Conv2d(channels[0], CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        skips = []
        for down in self.down:
            skips.append(h)
            h = down(F.max_pool2d(h, 2))
        for up, merge in zip(self.up, self.merge, strict=True):
            h = merge(torch.cat([skips.pop(), up(h)], dim=1))
        return self.head(h)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mix_channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm_channels(x))


class MLPMixer(nn.Module):
    def __init__(self, side: int = 16, patch: int = 4, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*[MixerBlock((side // patch) ** 2, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(image).flatten(2).transpose(1, 2))).mean(dim=1))


class Tower(nn.Module):
    def __init__(self, rows: int, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.ids = nn.Embedding(rows, width)
        self.numbers = nn.Linear(4, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.dropout = nn.Dropout(0.1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        h = self.ids(features["id"]) + self.numbers(features["numbers"])
        for layer in self.layers:
            h = self.dropout(torch.relu(layer(h)))
        return F.normalize(h, dim=-1)


class TwoTower(nn.Module):
    """Two halves that meet only at the end, a dict of dicts in and a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = Tower(30), Tower(50)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, features: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        user, item = self.user(features["user"]), self.item(features["item"])
        return {"similarity": self.temperature * user @ item.T, "user": user, "item": item}


class UsedInThreePlaces(nn.Module):
    """One parameter, `table`, reads the tokens, is added in the middle and makes the logits."""

    def __init__(self, rows: int = 20, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width) * 0.2)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table[ids]
        for number, layer in enumerate(self.layers):
            h = h + self.dropout(torch.tanh(layer(h)))
            if number == len(self.layers) // 2:
                h = h + torch.softmax(h @ self.table.T, dim=-1) @ self.table
        return F.linear(h, self.table)


def _images(size: int = 4, side: int = 16) -> Batch:
    return {"image": pixels(size, side)}


def _classify(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output), device=output.device) % CLASSES)


def _segment(output: Tensor, batch: Batch) -> Tensor:
    brightness = batch["image"].mean(dim=1)
    return F.cross_entropy(output, (brightness > 0).long())


def _two_towers(size: int = 4) -> Batch:
    def side(seed: int, rows: int) -> dict[str, Tensor]:
        g = generator(seed)
        return {"id": torch.randint(0, rows, (size,), generator=g), "numbers": torch.randn(size, 4, generator=g)}

    return {"features": {"user": side(0, 30), "item": side(1, 50)}}


def _contrast(output: dict[str, Tensor], batch: Batch) -> Tensor:
    similarity = output["similarity"]
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def _ids(size: int = 4, length: int = 6) -> Batch:
    return {"ids": torch.randint(0, 20, (size, length), generator=generator())}


def _next_token(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


ARCHITECTURES: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("unet", UNet, _images, _segment),
        Toy("mlp_mixer", MLPMixer, _images, _classify),
        Toy("two_tower", TwoTower, _two_towers, _contrast),
        Toy("used_in_three_places", UsedInThreePlaces, _ids, _next_token),
    )
}
TOYS: dict[str, Toy] = ARCHITECTURES | TRAPS
