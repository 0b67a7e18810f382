"""Rows about weights of few numbers: experts that share a core, low rank, powers of two."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEEDS = 3
Lines = list[list[str]]


def digits() -> Any:
    """Digits in a fixed order: x (n, 64) of 0 to 1, and classes; the last 360 are held out."""
    import torch
    from sklearn.datasets import load_digits  # type: ignore[import-not-found]

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def network(seed: int) -> Any:
    """64-256-256-10."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))


def trained(seed: int, after: Callable[[Any], None] | None = None, epochs: int = 15) -> Any:
    """A network after some epochs; ``after`` changes it behind each."""
    import torch
    import torch.nn.functional as F

    x, y = digits()
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(1437, generator=shuffle).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
        if after is not None:
            after(model)
    return model


def accuracy(model: Any) -> float:
    """On the digits held out."""
    import torch

    x, y = digits()
    with torch.no_grad():
        return float((model(x[1437:]).argmax(1) == y[1437:]).double().mean())


def mean(numbers: Iterator[float]) -> float:
    """Of as many as there are seeds."""
    return sum(numbers) / SEEDS


def low_rank() -> Lines:
    """Two hidden layers of rank 4: cut off after training, or projected after each epoch."""
    from merak_like.runtime.methods.projection import chosen, project, two_linears

    rank, layers = 4, "[02]"

    def projected(energy: bool) -> Callable[[Any], None]:
        def after(model: Any) -> None:
            for one in chosen(model, layers, rank).values():
                project(one.weight, rank, energy=energy)

        return after

    dense = [trained(seed) for seed in range(SEEDS)]
    late = copy.deepcopy(dense)
    for model in late:
        projected(False)(model)
    plain, energy = ([trained(s, projected(e)) for s in range(SEEDS)] for e in (False, True))
    scores = [mean(map(accuracy, some)) for some in (dense, late, plain, energy)]
    exported = two_linears(plain[0], rank, layers)
    x, _ = digits()
    off = float((exported(x) - plain[0](x)).abs().max())
    where = f"digits, 64-256-256-10, rank {rank}, {SEEDS} seeds"
    return [
        [where, "accuracy: full rank, cut off, projected, with energy", "", " ".join(f"{s:.3f}" for s in scores)],
        [where, "projected better than cut off by", "0.10", f"{scores[2] - scores[1]:.3f}"],
        [where, "projected worse than full rank by", "0.07", f"{scores[0] - scores[2]:.3f}"],
        [where, "two Linear layers differ by", "1e-5", f"{off:.0e}"],
    ]


def element_weights() -> Lines:
    """The first hidden layer's weighted error by plain, side-weighted and element-weighted factors."""
    import torch.nn.functional as F

    from merak_like.split.element_weights import factor_elements, spread, weighted_error
    from merak_like.split.low_rank import factor, fisher_information

    x, y = digits()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 1437, 8)]
    lines: Lines = []
    models = [trained(seed) for seed in range(SEEDS)]
    for rank in (4, 8):
        errors, scores = [0.0] * 3, [0.0] * 3
        for model in models:
            weight = model[0].weight.detach()
            fisher = fisher_information(model, ["0.weight"], batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))[
                "0.weight"
            ]
            pairs = [(p.u @ p.s, p.v) for p in (factor(weight, rank), factor(weight, rank, fisher))]
            pairs.append(factor_elements(weight, rank, fisher))
            for i, pair in enumerate(pairs):
                errors[i] += weighted_error(weight, *pair, fisher) / SEEDS
                changed = copy.deepcopy(model)
                changed[0].weight.data.copy_(pair[0] @ pair[1])
                scores[i] += accuracy(changed) / SEEDS
        where = f"digits, first layer, rank {rank}, {SEEDS} seeds"
        found = " ".join(f"{e / errors[0]:.2f}" for e in errors)
        lines += [
            [where, "weighted error to plain: plain, sides, elements", "falling", found],
            [where, "accuracy without tuning: plain, sides, elements", "", " ".join(f"{s:.3f}" for s in scores)],
            [where, "spread of the information", "", f"{spread(fisher):.1f}"],
        ]
    return lines


def powers() -> Lines:
    """A trained network kept in a file of powers of two."""
    from merak_like.runtime.methods import powers as kept

    gains, before, after = [], [], []
    for seed in range(SEEDS):
        model = trained(seed)
        state = model.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "half.safetensors"
            kept.save(state, path)
            gains.append(sum(t.nbytes for t in state.values()) / path.stat().st_size)
            before.append(accuracy(model))
            model.load_state_dict(kept.load(path))
            after.append(accuracy(model))
    where = f"digits, 64-256-256-10, {SEEDS} seeds"
    return [
        [where, "file smaller than float32", "6 x", f"{min(gains):.1f} x"],
        [where, "accuracy less by (mean)", "0.010", f"{(sum(before) - sum(after)) / SEEDS:.3f}"],
    ]


def experts(steps: int = 150) -> Lines:
    """A language model of one block on letters: 8 experts with a shared core, and a dense layer of as many numbers."""
    import pydoc_data.topics as topics

    import torch
    import torch.nn.functional as F
    from torch import nn

    from merak_like.runtime.methods.experts import MatrixProductExperts

    words = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:200_000]
    letters = sorted(set(words))
    ids = torch.tensor([letters.index(letter) for letter in words])
    train, held = ids[:180_000], ids[180_000:]

    class Block(nn.Module):
        def __init__(self, forward: nn.Module) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(len(letters), 64), nn.Embedding(64, 64)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(3))
            self.feed, self.head = forward, nn.Linear(64, len(letters))

        def forward(self, rows: Any) -> Any:
            x = self.embed(rows[:, :-1]) + self.place.weight
            y, mask = self.norms[0](x), torch.ones(64, 64, dtype=torch.bool).triu(1)
            x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + self.feed(self.norms[1](x))
            return F.cross_entropy(self.head(self.norms[2](x)).flatten(0, 1), rows[:, 1:].flatten())

    def loss(kind: str, seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        shared = MatrixProductExperts(8, (2, 2, 4, 2, 2), (2, 4, 4, 4, 2), top=2)
        size = sum(p.numel() for p in shared.parameters())
        width = round((size - 64) / (2 * 64 + 1))
        feed = shared if kind == "experts" else nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))
        model = Block(feed)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        drawn = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(train) - 65, (16,), generator=drawn)
            optimizer.zero_grad()
            model(torch.stack([train[s : s + 65] for s in starts])).backward()
            optimizer.step()
        with torch.no_grad():
            found = [float(model(held[i : i + 65 * 32].view(32, 65))) for i in range(0, 65 * 32 * 8, 65 * 32)]
        return sum(found) / len(found), sum(p.numel() for p in feed.parameters())

    both = {kind: [loss(kind, seed) for seed in range(SEEDS)] for kind in ("experts", "dense")}
    means = {kind: mean(number for number, _ in found) for kind, found in both.items()}
    where = f"letters, one block of 64, {steps} steps, {SEEDS} seeds"
    return [
        [
            where,
            "numbers: 8 experts with a shared core, dense",
            "",
            f"{both['experts'][0][1]:,} {both['dense'][0][1]:,}",
        ],
        [where, "held-out loss: experts, dense", "<= dense", f"{means['experts']:.3f} {means['dense']:.3f}"],
    ]


def binarised(epochs: int = 12) -> Lines:
    """An edge layer of signs beside one of floats: accuracy, and what a decoder finds of the digits."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from merak_like.runtime.codecs import Context, codec
    from merak_like.split.binarised import Binary, BinaryLinear, leak_loss

    x, y = digits()

    def run(kind: str, seed: int) -> tuple[float, float, float]:
        torch.manual_seed(seed)
        first = nn.Linear(64, 512) if kind == "float" else BinaryLinear(64, 512)
        edge = nn.Sequential(first, nn.BatchNorm1d(512), nn.Tanh() if kind == "float" else Binary())
        host = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam([*edge.parameters(), *host.parameters()], 1e-3)
        for _ in range(epochs):
            for some in torch.randperm(1437).split(64):
                z = edge(x[some])
                loss = F.cross_entropy(host(z), y[some])
                loss = loss + leak_loss(x[some], z) if kind == "leak" else loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        edge.eval()
        with torch.no_grad():
            z = edge(x)
            right = float((host(z[1437:]).argmax(1) == y[1437:]).double().mean())
            frame = codec("identity" if kind == "float" else "sign").encode(z[:64], Context(step=0))
        decoder = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
        optimizer = torch.optim.Adam(decoder.parameters(), 1e-3)
        for _ in range(epochs * 3):
            for some in torch.randperm(1437).split(64):
                optimizer.zero_grad()
                F.mse_loss(decoder(z[some]), x[some]).backward()
                optimizer.step()
        with torch.no_grad():
            error = float(F.mse_loss(decoder(z[1437:]), x[1437:]))
        return right, error, z[:64].nbytes / frame.numel()

    found = {kind: [run(kind, seed) for seed in range(SEEDS)] for kind in ("float", "binary", "leak")}
    right, error = ({k: mean(r[i] for r in some) for k, some in found.items()} for i in (0, 1))
    blind = float(F.mse_loss(x[:1437].mean(0).expand(360, 64), x[1437:]))
    where = f"digits, 512 features at the cut, {SEEDS} seeds"
    times = f"{error['binary'] / error['float']:.1f} x {error['leak'] / error['float']:.1f} x"
    errors = " ".join(f"{v:.4f}" for v in (*error.values(), blind))
    return [
        [where, "fewer bytes of a batch of 64, frame included", "31 x", f"{found['binary'][0][2]:.1f} x"],
        [where, "accuracy: float, signs, signs and leak loss", "-0.03", " ".join(f"{v:.3f}" for v in right.values())],
        [where, "decoder's error to float's: signs, signs and leak loss", "3 x", times],
        [where, "decoder's error: float, signs, with leak loss; by the mean", "", errors],
    ]


def superposed(epochs: int = 12) -> Lines:
    """C3-SL at a wide cut: groups of 1, 4 and 16."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from merak_like.runtime.codecs import Context, codec
    from merak_like.runtime.codecs.convolution import C3SL
    from merak_like.runtime.codecs.loopback import Loopback

    x, y = digits()

    def run(group: int, seed: int) -> float:
        torch.manual_seed(seed)
        edge, host = nn.Sequential(nn.Linear(64, 4096), nn.Tanh()), nn.Linear(4096, 10)
        optimizer = torch.optim.Adam([*edge.parameters(), *host.parameters()], 3e-4)
        link, step = Loopback(codec(f"c3sl({group})"), codec(f"c3sl({group})")), 0
        for _ in range(epochs):
            for some in torch.randperm(1437).split(64):
                optimizer.zero_grad()
                F.cross_entropy(host(link(edge(x[some]), Context(step=step))), y[some]).backward()
                optimizer.step()
                step += 1
        with torch.no_grad():
            z = link(edge(x[1437:]), Context(step=step, training=False))
            return float((host(z).argmax(1) == y[1437:]).double().mean())

    scores = {group: mean(run(group, seed) for seed in range(SEEDS)) for group in (1, 4, 16)}
    torch.manual_seed(0)
    coder, z = C3SL(group=4), torch.randn(4, 96)
    keys = coder.keys(4, 96)
    turned = torch.stack([torch.stack([k.roll(n) for n in range(96)], 1) for k in keys])
    direct = torch.einsum("ijk,ik->j", turned, z.double())
    off = float((coder.pack(z, Context(step=0))[0][0] - direct).abs().max())
    where = f"digits, 4096 features at the cut, {SEEDS} seeds"
    return [
        ["4 samples of 96", "by FFT differs from direct convolution by", "1e-6", f"{off:.0e}"],
        [where, "accuracy with groups of 1, 4, 16", "", " ".join(f"{s:.3f}" for s in scores.values())],
        [where, "groups of 4 worse by", "0.025", f"{scores[1] - scores[4]:.3f}"],
    ]
