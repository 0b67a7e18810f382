"""SFT's first matrix factored plainly, by sides and by elements: accuracy after tuning on topics of Python's manual.

A small encoder learns masked words of all topics; then which of the four longest topics 32 words are from, with layer 1
of 4 narrowed to 8 numbers a word. The Fisher information is of that task, after one epoch of the classifier alone.
"""

from __future__ import annotations

import copy
import pydoc_data.topics as manual
import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like.split.element_weights import factor_by_elements, spread, weighted_error
from merak_like.split.low_rank import factor, fisher_information
from merak_like.split.sft import sft

Lines = list[list[str]]
WIDTH, WORDS, LENGTH, RANK, LAYER, SEEDS = 96, 2000, 32, 8, "layers.1", 6
WEIGHT = f"{LAYER}.linear1.weight"


class Encoder(nn.Module):
    """Four layers, a classifier of the mean word, and the masked words' scores from the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, 4)

    def hidden(self, ids: Tensor) -> Tensor:
        """(samples, words, width)."""
        x = self.word(ids) + self.place
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and its scores."""
        logits = self.head(self.hidden(ids).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def words(text: str) -> list[str]:
    """Words and signs."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def data() -> tuple[Tensor, Tensor, Tensor]:
    """All words in rows, and those of the four longest topics with their topic; words not among the most are 0."""
    known = {
        w: n + 1 for n, (w, _) in enumerate(Counter(words(" ".join(manual.topics.values()))).most_common(WORDS - 1))
    }

    def rows(text: str) -> Tensor:
        ids = torch.tensor([known.get(w, 0) for w in words(text)])
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    longest = sorted(manual.topics, key=lambda name: -len(manual.topics[name]))[:4]
    some = [rows(manual.topics[name]) for name in longest]
    labels = torch.cat([torch.full((len(x),), n) for n, x in enumerate(some)])
    return torch.cat([rows(manual.topics[name]) for name in sorted(manual.topics)]), torch.cat(some), labels


def pretrained(ids: Tensor, steps: int = 400) -> Encoder:
    """Learns every seventh word from the others."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        some = ids[torch.randint(len(ids), (32,))]
        hide = torch.rand(some.shape) < 0.15
        hidden = model.hidden(some.masked_fill(hide, 0))[hide]
        optimizer.zero_grad()
        F.cross_entropy(hidden @ model.word.weight.T, some[hide]).backward()
        optimizer.step()
    return model


def tuned(model: nn.Module, train: Any, test: Any, seed: int, epochs: int = 3, only: str = "") -> float:
    """Train in place; accuracy."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for n, p in model.named_parameters() if n.startswith(only)]
    optimizer = torch.optim.AdamW(parameters, 1e-3 if only else 5e-4)
    for _ in range(epochs):
        for some in torch.randperm(len(train[0]), generator=generator).split(32):
            optimizer.zero_grad()
            model(train[0][some], train[1][some])["loss"].backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(*test)["logits"].argmax(1) == test[1]).double().mean())


def topics() -> Lines:
    """See the module."""
    torch.set_num_threads(1)
    ids, rows, labels = data()
    base = pretrained(ids)
    scores: dict[str, list[float]] = {name: [] for name in ("no cut", "plain", "sides", "elements")}
    errors, unequal = [0.0, 0.0, 0.0], 0.0
    for seed in range(SEEDS):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        held, used = order.split([len(order) // 4, len(order) - len(order) // 4])
        train, test = (rows[used], labels[used]), (rows[held], labels[held])
        torch.manual_seed(seed)
        first = copy.deepcopy(base)
        nn.init.normal_(first.head.weight, std=0.02)
        tuned(first, train, test, seed, 1, "head")
        batches = [(train[0][n : n + 4], train[1][n : n + 4]) for n in range(0, 400, 4)]
        fisher = fisher_information(first, [WEIGHT], batches, lambda model, some: model(*some)["loss"])
        weight, own = first.get_parameter(WEIGHT).detach(), fisher[WEIGHT]
        ways = factor(weight, RANK), factor(weight, RANK, own), factor_by_elements(weight, RANK, own)
        found = [weighted_error(weight, p.u @ p.s, p.v, own) for p in ways]
        errors = [a + b / found[0] / SEEDS for a, b in zip(errors, found, strict=True)]
        unequal += spread(own) / SEEDS
        for name, made in scores.items():
            model = copy.deepcopy(first)
            if name != "no cut":
                given: Any = {} if name == "plain" else {"fisher": fisher, "weigh": name}
                sft(model, {"ids": train[0][:4], "labels": train[1][:4]}, LAYER, RANK, **given)
            made.append(tuned(model, train, test, seed))
    means = {name: sum(made) / SEEDS for name, made in scores.items()}
    majority = float(labels.bincount().max()) / len(labels)
    where = f"four topics, encoder of 96, layer 2 of 4 sends {RANK} numbers, {SEEDS} seeds"
    return [
        [where, "weighted error to plain: plain, sides, elements", "falling", " ".join(f"{e:.2f}" for e in errors)],
        [where, "spread of the information", "", f"{unequal:.1f}"],
        [where, "accuracy: no cut, plain, sides, elements; always the longest", "",
         " ".join(f"{s:.3f}" for s in (*means.values(), majority))],
        [where, "tuned from sides worse than from plain by", "0.010", f"{means['plain'] - means['sides']:.3f}"],
        [where, "tuned from elements worse than from plain by", "0.010", f"{means['plain'] - means['elements']:.3f}"],
    ]  # fmt: skip
