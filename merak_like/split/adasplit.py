"""AdaSplit (Chopra et al. 2021, arXiv 2112.01637): edges that learn without a gradient from their server.

    phase       edge                                             server
    local       contrastive loss on its own labels               idle; nothing is sent
    with server the same; of those chosen, features and labels ──► cross-entropy through the client's mask

Nothing ever comes back to an edge. The server's weights are common, but each client sees them through a mask of its own
that an L1 term makes sparse, so clients that differ disturb each other little. Which clients are heard, ``Chooser``
decides by the server's losses.

Edges and server are modules in this process; what is sent is a codec's frames, counted by their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from merak_like.runtime.codecs import Codec, Context, codec
from merak_like.split.choosing import Chooser

Batch = tuple[Tensor, Tensor]
"""Samples and their classes."""


@dataclass(frozen=True)
class Settings:
    """How AdaSplit trains."""

    epochs: int = 10
    local: float = 0.6
    """Share of the epochs in which nothing is sent (the paper's kappa)."""
    heard: float = 0.6
    """Share of the clients heard at a step (eta)."""
    temperature: float = 0.07
    """Of the contrastive loss."""
    decay: float = 0.87
    """Of the chooser's sums."""
    mask: float = 1e-4
    """Weight of the masks' L1 term."""
    mask_rate: float = 0.05
    sparse: float = 0.0
    """Weight of the L1 term on features; with a codec such as ``topk(0.1)`` fewer of them are sent."""
    codec: str = "identity"
    edge_rate: float = 1e-3
    server_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Raises ValueError for shares that are none."""
        if not 0 <= self.local <= 1 or not 0 < self.heard <= 1 or self.epochs < 1:
            raise ValueError(
                f"local {self.local}, heard {self.heard}, epochs {self.epochs}: the first two are shares, at least one "
                "epoch is needed"
            )


def contrastive(features: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020, eq. 2) of (samples, numbers): near in a class, else far.

    A sample that is alone in its class counts nothing; zero where all are.
    """
    unit = F.normalize(features, dim=1)
    alike = unit @ unit.T / temperature
    own = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    together = (classes[:, None] == classes[None, :]) & ~own
    logs = alike - alike.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    counts = together.sum(1)
    means = logs.masked_fill(~together, 0.0).sum(1) / counts.clamp(min=1)
    return -means[counts > 0].sum() / (counts > 0).sum().clamp(min=1)


class Masked:
    """A server's model whose weights each client sees through a mask of its own, all ones at first."""

    def __init__(self, model: nn.Module, clients: int, rate: float, mask_rate: float, strength: float) -> None:
        self.model, self.strength = model, strength
        self.optimizer = torch.optim.Adam(model.parameters(), rate)
        self.masks = [
            {name: torch.ones_like(p, requires_grad=True) for name, p in model.named_parameters()}
            for _ in range(clients)
        ]
        self._learners = [torch.optim.Adam(mask.values(), mask_rate) for mask in self.masks]

    def __call__(self, client: int, features: Tensor) -> Tensor:
        """What the server says of a client's features."""
        seen = {name: p * self.masks[client][name] for name, p in self.model.named_parameters()}
        return functional_call(self.model, seen, (features,))

    def learn(self, client: int, features: Tensor, classes: Tensor) -> float:
        """One step on a client's features; the cross-entropy before it.

        A weight that the client does not see stays where it is, whatever the optimizer remembers of others.
        """
        loss = F.cross_entropy(self(client, features), classes)
        learner = self._learners[client]
        for each in (self.optimizer, learner):
            each.zero_grad()
        (loss + self.strength * sum(mask.sum() for mask in self.masks[client].values())).backward()
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer.step()
        learner.step()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                mask = self.masks[client][name]
                mask.clamp_(min=0.0)  # what the L1 term has brought to zero stays there until it is of use
                p.copy_(torch.where(mask > 0, p, before[name]))
        return float(loss.detach())

    def seen(self, client: int) -> float:
        """Share of the weights that a client sees."""
        kept = sum(int((m > 0).sum()) for m in self.masks[client].values())
        return kept / sum(m.numel() for m in self.masks[client].values())


@dataclass(frozen=True)
class Edge:
    """A client's side."""

    model: nn.Module
    """Its layers before the cut."""
    projector: nn.Module
    """Features to what the contrastive loss compares; never leaves the edge."""
    optimizer: Optimizer

    def learn(self, batch: Batch, settings: Settings) -> Tensor:
        """One local step; the features before it, without their history."""
        samples, classes = batch
        features = self.model(samples)
        loss = contrastive(self.projector(features.flatten(1)), classes, settings.temperature)
        loss = loss + settings.sparse * features.abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return features.detach()


class AdaSplit:
    """Trains edges and their server."""

    def __init__(
        self, edges: Sequence[tuple[nn.Module, nn.Module]], server: nn.Module, settings: Settings | None = None
    ) -> None:
        """``edges`` are (layers before the cut, projector) for each client; they share nothing."""
        self.settings = its = settings or Settings()
        self.edges = [Edge(m, p, torch.optim.Adam([*m.parameters(), *p.parameters()], its.edge_rate)) for m, p in edges]
        self.server = Masked(server, len(edges), its.server_rate, its.mask_rate, its.mask)
        self.chooser = Chooser(len(edges), its.decay)
        self.bytes: Counter[str] = Counter()
        """"up" and "down", of frames; nothing is ever added to "down"."""
        self.edge_flops = 0
        """Of all edges, forward and backward."""
        self._codecs = [(codec(its.codec), codec(its.codec), codec("identity"), codec("identity")) for _ in edges]
        self._flops: dict[tuple[int, tuple[int, ...]], int] = {}
        self._steps = 0

    def fit(
        self, batches: Callable[[int], Sequence[Iterable[Batch]]], on_epoch: Callable[[int], None] = lambda epoch: None
    ) -> None:
        """Train all epochs; ``batches(epoch)`` gives each client's batches."""
        alone = round(self.settings.local * self.settings.epochs)
        for epoch in range(self.settings.epochs):
            for step in _together(batches(epoch)):
                self.step(step, listening=epoch >= alone)
            on_epoch(epoch)

    def step(self, batches: Mapping[int, Batch], *, listening: bool) -> None:
        """Every client learns from its batch; with ``listening`` the server then from those chosen among them."""
        features = {client: self._local(client, batch) for client, batch in batches.items()}
        if listening:
            count = max(1, round(self.settings.heard * len(self.edges)))
            chosen = [client for client in self.chooser.choose(len(self.edges)) if client in batches][:count]
            losses = {client: self._send(client, features[client], batches[client][1]) for client in chosen}
            self.chooser.heard(losses)
        self._steps += 1

    def _local(self, client: int, batch: Batch) -> Tensor:
        kind = client, tuple(batch[0].shape)
        if kind in self._flops:
            features = self.edges[client].learn(batch, self.settings)
        else:  # counting is slow, and a shape's operations are always as many
            with FlopCounterMode(display=False) as counter:
                features = self.edges[client].learn(batch, self.settings)
            self._flops[kind] = counter.get_total_flops()
        self.edge_flops += self._flops[kind]
        return features

    def _send(self, client: int, features: Tensor, classes: Tensor) -> float:
        near, far, plain, plainly = self._codecs[client]
        arrived = self._over(near, far, features)
        labels = self._over(plain, plainly, classes.to(torch.int16)).long()
        return self.server.learn(client, arrived, labels)

    def _over(self, near: Codec, far: Codec, x: Tensor) -> Tensor:
        context = Context(step=self._steps, training=False)  # no gradient of it will come
        frame = near.encode(x, context)
        self.bytes["up"] += frame.numel()
        return far.decode(frame, context)

    def predict(self, client: int, samples: Tensor) -> Tensor:
        """Classes' scores of a client's samples, through its own edge and mask."""
        model, server = self.edges[client].model, self.server.model
        modes = model.training, server.training
        model.eval()
        server.eval()
        with torch.no_grad():
            said = self.server(client, model(samples))
        model.train(modes[0])
        server.train(modes[1])
        return said


def _together(clients: Sequence[Iterable[Batch]]) -> Iterator[dict[int, Batch]]:
    """A batch of each client that still has one, step by step."""
    under_way = {client: iter(batches) for client, batches in enumerate(clients)}
    while under_way:
        step: dict[int, Batch] = {}
        for client, batches in list(under_way.items()):
            if (batch := next(batches, None)) is None:
                del under_way[client]
            else:
                step[client] = batch
        if step:
            yield step
