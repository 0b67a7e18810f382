"""What is trained through a codec: a tiny language model on Python's own documentation, and a classifier of digits."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.loopback import Loopback

WIDTH, SEQUENCE, SAMPLES, BATCH = 64, 64, 192, 32


class Block(nn.Module):
    """A pre-LN transformer block with causal attention."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x_bsd: Tensor) -> Tensor:
        """Add attention, then the feed-forward."""
        b, s, d = x_bsd.shape
        q, k, v = self.qkv(self.norm1(x_bsd)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d)
        x_bsd = x_bsd + self.out(mixed)
        return x_bsd + self.ffn(self.norm2(x_bsd))


class Front(nn.Module):
    """Embeddings and two blocks: what stays at the edge."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(letters, WIDTH), nn.Parameter(0.02 * torch.randn(SEQUENCE, WIDTH))
        self.blocks = nn.Sequential(Block(WIDTH), Block(WIDTH))

    def forward(self, ids_bs: Tensor) -> Tensor:
        """Hidden states (b, s, d)."""
        return self.blocks(self.token(ids_bs) + self.place)


def text() -> tuple[Tensor, int]:
    """The first samples of `pydoc_data.topics` as letters, (SAMPLES, SEQUENCE + 1), and how many letters there are."""
    words = "\n".join(topics.topics[name] for name in sorted(topics.topics))[: SAMPLES * (SEQUENCE + 1)]
    letters = sorted(set(words))
    ids = torch.tensor([letters.index(letter) for letter in words])
    return ids.view(SAMPLES, SEQUENCE + 1), len(letters)


def language_model(
    name: str, epochs: int, seed: int = 0
) -> tuple[dict[str, float], Callable[[], tuple[Tensor, Tensor]]]:
    """Train through the codec, without dropout, on the same samples every epoch.

    Returns what happened in the last epoch, and a function that gives the activation of a batch and, after one more
    step, the activation again.
    """
    torch.manual_seed(seed)
    ids, letters = text()
    front = Front(letters)
    back = nn.Sequential(Block(WIDTH), Block(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters))
    optimizer = torch.optim.AdamW([*front.parameters(), *back.parameters()], 1e-3)
    link = Loopback(codec(name), codec(name))
    order = torch.Generator().manual_seed(seed)
    steps = 0

    def step(chosen: Tensor) -> tuple[Tensor, Tensor, float]:
        nonlocal steps
        hidden = front(ids[chosen, :-1])
        arrived = link(hidden, Context(step=steps, samples=tuple(chosen.tolist())))
        loss = F.cross_entropy(back(arrived).flatten(0, 1), ids[chosen, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        return hidden.detach(), arrived.detach(), loss.item()

    found: dict[str, float] = {}
    for _ in range(epochs):
        wrong = right = total = 0.0
        for chosen in torch.randperm(SAMPLES, generator=order).split(BATCH):
            hidden, arrived, loss = step(chosen)
            wrong += (arrived - hidden).square().sum().item()
            right += hidden.square().sum().item()
            total += loss * len(chosen) / SAMPLES
        found = {"error": (wrong / right) ** 0.5, "loss": total}

    def activations() -> tuple[Tensor, Tensor]:
        chosen = torch.arange(BATCH)
        return step(chosen)[0], step(chosen)[0]

    return found, activations


def digits(name: str, epochs: int, seed: int) -> dict[str, float]:
    """Accuracy on 360 of scikit-learn's 1797 digits, after training an MLP on the others through the codec."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found]

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    torch.manual_seed(seed)
    front = nn.Sequential(nn.Linear(64, 512), nn.Tanh())
    back = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam([*front.parameters(), *back.parameters()], 1e-3)
    link = Loopback(codec(name), codec(name))
    shuffle = torch.Generator().manual_seed(seed)
    steps = 0
    for _ in range(epochs):
        for chosen in torch.randperm(1437, generator=shuffle).split(64):
            context = Context(step=steps, samples=tuple(chosen.tolist()))
            loss = F.cross_entropy(back(link(front(x[chosen]), context)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    plain = 2 * 4 * 512 * 1437 * epochs
    with torch.no_grad():
        guess = back(link(front(x[1437:]), Context(step=steps, training=False))).argmax(1)
    sent = link.sent["forward"] + link.sent["backward"]
    return {"accuracy": (guess == y[1437:]).double().mean().item(), "ratio": plain / sent}
