"""How much of the text whoever reads the wire can find again: measured on the owner's data, before any real session.

A decoder is trained to name the token at each place from what the edge would send for it, on some batches, and asked on
others. Its score stands beside that of always naming the most frequent token. It is a lower bound: a better decoder, or
one that reads a token's neighbours too, finds more. Likewise a classifier is asked for the labels behind the gradients
that the edge's tail sends: with a tail of one layer those tell them nearly surely (Erdogan et al. 2022, "UnSplit:
data-oblivious model inversion, model stealing, and label inference attacks against split learning"). Distance
correlation (Szekely et al. 2007, "Measuring and testing dependence by correlation of distances", sec. 2) is told as
well, and proves nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merak_like.runtime.batches import rows
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.loopback import Loopback
from merak_like.runtime.links import NoLinks, Spec
from merak_like.split.binarised import leak_loss
from merak_like.split.elsewhere import Leaves
from merak_like.split.exchange import Exchange
from merak_like.split.half import Made, Source, build_half
from merak_like.split.halves import LABELS
from merak_like.split.messages import Task
from merak_like.split.screen import Screen

TOKENS = "input_ids"


@dataclass(frozen=True)
class Labels:
    """What the gradients that are sent tell of labels, as shares of unseen batches'."""

    found: float
    """By a classifier."""
    majority: float
    """By always naming the most frequent one."""

    def __str__(self) -> str:
        return (
            f"From the gradients that are sent {self.found:.1%} of the labels are found (always the most frequent one: "
            f"{self.majority:.1%})."
        )


@dataclass(frozen=True)
class Leakage:
    """Shares of tokens, 0 to 1."""

    recovered: float
    """Tokens of unseen batches that the decoder names right."""
    majority: float
    """The same for always naming the most frequent one."""
    correlation: float
    """Distance correlation between the embedded tokens and what is sent; 0: independent."""
    numbers: int
    """Numbers a token that are sent."""
    tokens: int
    """Tokens asked for."""
    labels: Labels | None = None
    """None: there is not one a sample."""

    def __str__(self) -> str:
        judged = "nearly all" if self.recovered > 0.9 else "most" if self.recovered > 0.5 else "some"
        return (
            f"a decoder finds {self.recovered:.1%} of {self.tokens} unseen tokens again (always the most frequent one: "
            f"{self.majority:.1%}), from {self.numbers} numbers a token; distance correlation {self.correlation:.2f}. "
            f"Whoever reads what is sent can read {judged} of the text; a better decoder reads more."
            f"{f' {self.labels}' if self.labels is not None else ''}"
        )


def leakage(
    source: Source,
    task: Task,
    batches: Sequence[tuple[Any, Sequence[int] | None]],
    *,
    steps: int = 400,
    seed: int = 0,
    screen: Screen | None = None,
) -> Leakage:
    """Measure on some batches, each with its samples' ids or None; the last quarter is kept for asking.

    No host is needed: the edge's head and both ends of the codec run here. Raises ValueError for batches without
    ``input_ids``, fewer than four, or a cut that sends no row a token.
    """
    if len(batches) < 4 or TOKENS not in batches[0][0]:
        raise ValueError(f"a leakage report needs four or more batches with {TOKENS}, found {len(batches)}")
    heard = overhear(source, task, batches, a_row_a_token, seed, screen)
    pairs: list[tuple[Tensor, Tensor]] = []
    for arrived, (batch, _) in zip(heard.arrived, batches, strict=True):
        kept = batch["attention_mask"].flatten() != 0 if "attention_mask" in batch else slice(None)
        pairs.append((arrived.flatten(0, 1).float()[kept], batch[TOKENS].flatten()[kept]))
    asked = kept_back(len(pairs))
    z, tokens = (torch.cat(part) for part in zip(*pairs[:-asked], strict=True))
    z_new, tokens_new = (torch.cat(part) for part in zip(*pairs[-asked:], strict=True))
    most = int(tokens.bincount().argmax())
    recovered = _decoder_score(z, tokens, z_new, tokens_new, steps, seed)
    table = _embedded(heard.model, tokens_new[:600])
    return Leakage(
        recovered, float((tokens_new == most).float().mean()), distance_correlation(table, z_new[:600]), z.shape[1],
        len(tokens_new), labels_found(heard, steps, seed),
    )  # fmt: skip


class Overheard(NamedTuple):
    """What whoever reads the wire sees of some batches."""

    model: nn.Module
    arrived: list[Tensor]
    """One value of each batch, as it comes out of the codec."""
    gradients: list[tuple[Tensor, Tensor]]
    """What the tail sends back, a row a sample, and the labels; of none where it has no label a sample."""


def overhear(
    source: Source, task: Task, batches: Sequence[tuple[Any, Sequence[int] | None]],
    which: Callable[[Any, Sequence[Spec]], Spec], seed: int, screen: Screen | None = None,
) -> Overheard:  # fmt: skip
    """Run the edge's head and both ends of the codecs on some batches; ``which`` picks what to listen to."""
    device = torch.device("cpu")
    exchange = Exchange({"up": "identity", "down": "identity"}, 0, device)
    alone = task.model_copy(update={"micro_batches": 1})
    made = build_half("edge", source, alone, batches[0][0], exchange, links=NoLinks(), optimizer=None, device=device,
                      screen=screen)  # fmt: skip
    link = Loopback(codec(task.codec), codec(task.codec))
    arrived = list[Tensor]()
    with torch.no_grad():
        for step, (batch, ids) in enumerate(batches):
            half = made.programs.at(batch)
            exchange.step = step
            leaves = half.stages[1]
            assert isinstance(leaves, Leaves)
            sent = leaves.leaving(0, batch, half.stages[0].forward(0, batch, {}))
            value = sent[which(batch, half.halves.sent).name]
            samples = tuple(ids) if ids is not None else tuple(range(step * rows(batch), (step + 1) * rows(batch)))
            arrived.append(link(value, Context(step, samples=samples)))
    told = [_gradients(made, batch, task.back_codec, seed + step) for step, (batch, _) in enumerate(batches)]
    made.engine.close()
    return Overheard(made.model, arrived, [pair for pair in told if pair is not None])


def kept_back(batches: int) -> int:
    """How many of the batches, the last, are for asking."""
    return max(1, batches // 4)


def a_row_a_token(batch: Any, sent: Sequence[Spec]) -> Spec:
    """The one value with a row a token."""
    shape = tuple(batch[TOKENS].shape)
    found = [s for s in sent if s.dtype.is_floating_point and s.shape[:2] == shape and len(s.shape) == 3]
    if len(found) != 1:
        raise ValueError(f"the cut sends {[s.shape for s in sent]}: no single value has a row a token")
    return found[0]


def _gradients(made: Made, batch: Any, text: str, seed: int) -> tuple[Tensor, Tensor] | None:
    """What the tail sends back for a batch, a row a sample, and the labels; None where it has no label a sample.

    The cloud is not there: normal numbers stand for what it returns, so this is about the tail and its codec alone.
    """
    half, labels = made.programs.at(batch), batch.get(LABELS)
    if not half.halves.tailed or labels is None or labels.dim() != 1 or labels.dtype.is_floating_point:
        return None
    generator = torch.Generator().manual_seed(seed)
    names = [s for s in half.halves.returned if s.requires_grad and s.shape[:1] == labels.shape]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        received = {k: v.detach() for k, v in half.stages[0].forward(0, batch, {}).items()}
        for spec in half.halves.returned:
            made_up = torch.randn(spec.shape, generator=generator).to(spec.dtype)
            received[spec.name] = made_up.requires_grad_() if spec.requires_grad else made_up
        out = half.stages[3].forward(0, batch, received)
        found = half.stages[3].backward(0, {"loss": torch.ones_like(out["loss"])})
    rows_ = list[Tensor]()
    for spec in names:
        link, context = Loopback(codec(text), codec(text)), Context(seed, samples=tuple(range(len(labels))))
        link.carry(received[spec.name].detach(), context)
        rows_.append(link.carry(found[spec.name], replace(context, direction="backward")).flatten(1).float())
    return (torch.cat(rows_, 1), labels) if rows_ else None


def labels_found(heard: Overheard, steps: int, seed: int) -> Labels | None:
    """Ask a classifier for the last quarter's labels; None where there is not one a sample."""
    pairs = heard.gradients
    asked = kept_back(len(heard.arrived))
    if len(pairs) <= asked:
        return None
    g, labels = (torch.cat(part) for part in zip(*pairs[:-asked], strict=True))
    g_new, labels_new = (torch.cat(part) for part in zip(*pairs[-asked:], strict=True))
    most = labels.unique(return_counts=True)
    majority = float((labels_new == most[0][most[1].argmax()]).float().mean())
    return Labels(_decoder_score(g, labels, g_new, labels_new, steps, seed), majority)


def _decoder_score(z: Tensor, tokens: Tensor, z_new: Tensor, tokens_new: Tensor, steps: int, seed: int) -> float:
    """Share of new tokens that a trained decoder names right."""
    known, targets = tokens.unique(return_inverse=True)
    mean, scale = z.mean(0), z.std(0) + 1e-6
    z, z_new = (z - mean) / scale, (z_new - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = 4 * max(64, z.shape[1])
        decoder = nn.Sequential(nn.Linear(z.shape[1], width), nn.GELU(), nn.Linear(width, len(known)))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(steps):
        some = torch.randint(len(z), (min(1024, len(z)),), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(decoder(z[some]), targets[some]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((known[decoder(z_new).argmax(1)] == tokens_new).float().mean())


def _embedded(model: nn.Module, tokens: Tensor) -> Tensor:
    """The tokens as the model's first embedding has them."""
    table = next((m.weight for m in model.modules() if isinstance(m, nn.Embedding) and not m.weight.is_meta), None)
    if table is None or int(tokens.max()) >= len(table):
        return nn.functional.one_hot(tokens).float()
    return table.detach()[tokens].float()


def distance_correlation(x: Tensor, y: Tensor) -> float:
    """Of the rows of two tables."""
    return float(leak_loss(x.detach().double(), y.detach().double()))
