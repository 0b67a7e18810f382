"""DP-KFAC: curvature from each layer's owner alone (Zhang, Shi, Li, IEEE TCC 2022, "Scalable K-FAC Training for Deep
Neural Networks with Distributed Preconditioning").

    backward     the owner of a layer adds up A = E[x x^T], G = E[g g^T] over its own micro-batches
    finish       gradients are summed over replicas as ever; then the owner turns  dW  into  G^-1 dW A^-1
    broadcast    and sends that to the other replicas

No factor ever travels. Every replica is the owner of some layers of its stage, so factors and inverses are spread over
the replicas. Damping is factored and averages are over all steps at first (Martens and Grosse 2015, sections 6.3 and
5), each token or image position is a row, a bias is a column of its layer. An owner sees 1/dp of the batch, fewer rows
than a wide layer has columns: it needs many steps in its average, so that of the past is the most of it (0.95 in the
authors' implementation). Embeddings, and layers that share a weight with one, keep their plain gradient. On
tensor-parallel ranks a factor is that of the rank's shard of the layer, an approximation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.layers import Watched
from merak_like.runtime.methods.method import Job, Method, Place
from merak_like.runtime.methods.wrapped import AfterSum
from merak_like.runtime.optimizer import agree_on
from merak_like.runtime.split_backward import Operands
from merak_like.runtime.stage_code import Piece

SOLID = torch.contiguous_format
"""What is sent lies in one piece."""


@dataclass
class Factor:
    """The running average of one side of a layer, and this step's sum."""

    mean: Tensor | None = None
    total: Tensor | None = None
    rows: int = 0
    steps: int = 0
    """That the average is of."""

    def add(self, rows: Tensor, count: int) -> None:
        """Rows of one micro-batch, (rows, width), which are so many samples or tokens."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        product = wide.t() @ wide
        self.total = product if self.total is None else self.total.add_(product)
        self.rows += count

    def settle(self, weight: float, scale: float) -> None:
        """Let this step's ``scale`` times sum into the average, plain until ``weight`` is more than its share."""
        if self.total is None:
            return
        new = self.total.mul_(scale)
        self.steps += 1
        self.mean = new if self.mean is None else self.mean.lerp_(new, max(weight, 1 / self.steps))
        self.forget()

    def forget(self) -> None:
        """Leave this step out."""
        self.total, self.rows = None, 0


@dataclass
class Curved:
    """A layer whose gradient is preconditioned."""

    name: str
    weight: nn.Parameter
    owner: int
    """A replica."""
    bias: nn.Parameter | None = None
    turned: bool = False
    """Whether the weight is (in, out), as in a product with ``addmm``."""
    seen: bool = False
    a: Factor = field(default_factory=Factor)
    g: Factor = field(default_factory=Factor)
    inverse: tuple[Tensor, Tensor] | None = None

    def gradient(self) -> Tensor:
        """Of weight and bias, (out, in [+ 1])."""
        assert self.weight.grad is not None
        matrix = self.weight.grad.t() if self.turned else self.weight.grad.flatten(1)
        return matrix if self.bias is None else torch.cat([matrix, self.bias.grad.unsqueeze(1)], 1)  # type: ignore[union-attr]

    def put(self, made: Tensor) -> None:
        """The gradient that replaces it."""
        weight, grad = self.weight, self.weight.grad
        assert grad is not None
        matrix = made if self.bias is None else made[:, :-1]
        grad.copy_(matrix.t() if self.turned else matrix.reshape(weight.shape))
        if self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(made[:, -1])

    @property
    def finite(self) -> bool:
        """Whether this step's sums are numbers."""
        return all(bool(f.total.isfinite().all()) for f in (self.a, self.g) if f.total is not None)

    @property
    def ready(self) -> bool:
        """Whether there is something to precondition, as on every other replica."""
        return self.seen and self.weight.grad is not None and (self.bias is None or self.bias.grad is not None)


class Kfac(Method):
    """Preconditions the gradients of Linear and Conv2d layers. The optimizer, clipping and norm see the result.

    ``damping`` is added to the factors' spectrum, ``weight`` is that of a new step in the running averages once they
    are of more than 1 / ``weight`` steps, inverses are made anew each ``every`` steps, ``kl_clip`` bounds the step's
    length in the curvature's own measure (None: not; then large rates are for large batches, see docs/methods.md).
    ``share_factors`` sums factors over replicas first: plain distributed K-FAC, for comparison.
    Averages are not in checkpoints: they are there again after a step.
    """

    watches = True

    def __init__(
        self, *, damping: float = 0.003, weight: float = 0.05, every: int = 1, kl_clip: float | None = 0.01,
        share_factors: bool = False,
    ) -> None:  # fmt: skip
        if damping <= 0 or not 0 < weight <= 1 or every < 1:
            raise ValueError(
                f"damping={damping}, weight={weight}, every={every}: damping is above 0, weight above 0 and at most 1, "
                "every at least 1"
            )
        self.damping, self.weight, self.every, self.kl_clip = damping, weight, every, kl_clip
        self.share_factors = share_factors
        self._layers: dict[int, Curved] = {}
        self._mine = 0

    def check(self, job: Job) -> None:
        """Whole weights, and gradients as they are."""
        if job.elsewhere:
            raise ValueError(
                f"Kfac preconditions the parameters' own gradients, {job.elsewhere} has them elsewhere: use zero=0 and "
                "float32, or torch.autocast around the engine"
            )

    def piece(self, piece: Piece) -> Piece:
        """Watch its layers."""
        return replace(piece, module=Watched(piece.module, self._around))  # type: ignore[arg-type]

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same, and then the owners precondition."""
        self._mine = 0 if place.replicas is None else dist.get_rank(place.replicas)
        embedded = {id(m.weight) for m in place.model.modules() if isinstance(m, nn.Embedding)}
        # a gradient that is summed over other ranks too would be preconditioned by each of them in its own way
        found = {
            n: p
            for n, p in place.parameters.items()
            if p.ndim in (2, 4) and id(p) not in embedded and n not in place.shared
        }
        owners = owners_of({n: _bytes(p) for n, p in found.items()}, place.count)
        self._layers = {id(p): Curved(n, p, owners[n]) for n, p in found.items()}
        return AfterSum(reducer, lambda: self.precondition(place.steps(), place))

    def owned(self) -> tuple[str, ...]:
        """Names of the weights whose factors this rank has."""
        return tuple(c.name for c in self._layers.values() if c.owner == self._mine and c.seen)

    @property
    def factor_bytes(self) -> int:
        """Of the running averages on this rank."""
        means = (f.mean for c in self._layers.values() for f in (c.a, c.g))
        return sum(mean.nbytes for mean in means if mean is not None)

    def _around(self, func: Any, found: Operands, call: Callable[[Tensor], Tensor]) -> Tensor:
        layer, made = self._layers.get(id(found.weight)), call(found.x)
        if layer is None or not made.requires_grad or not _fits(found):
            return made
        bias = found.bias if isinstance(found.bias, nn.Parameter) and found.bias.requires_grad else None
        layer.bias, layer.turned = bias, found.weight.ndim == 2 and func is not F.linear
        layer.seen = True
        if layer.owner != self._mine and not self.share_factors:
            return made
        with torch.no_grad():
            rows = _rows_in(found)
            layer.a.add(rows if bias is None else F.pad(rows, (0, 1), value=1.0), len(rows))

        def note(g: Tensor) -> None:
            with torch.no_grad():
                image = found.weight.ndim == 4  # its positions share one loss, a token has its own
                rows = g.movedim(1, -1).flatten(0, -2) if image else g.flatten(0, -2)
                layer.g.add(rows, len(g) if image else len(rows))

        made.register_hook(note)
        return made

    @torch.no_grad()
    def precondition(self, step: int, place: Place) -> None:
        """Turn the summed gradients of all layers into preconditioned ones, on all replicas."""
        ready = [layer for layer in self._layers.values() if layer.ready]
        for layer in ready:
            if self.share_factors and place.replicas is not None:
                self._share(layer, place)
            # g is of the mean over all n samples of all replicas; n g is that of one sample's own loss
            if layer.finite:
                layer.g.settle(self.weight, layer.g.rows * place.count**2)
                layer.a.settle(self.weight, 1 / max(1, layer.a.rows))
        works: list[tuple[Any, Curved, Tensor, Tensor]] = []
        for layer in ready:
            before = layer.gradient()
            mine = layer.owner == self._mine
            made = self._of_owner(layer, before, step) if mine else torch.empty_like(before, memory_format=SOLID)
            work = None
            if place.replicas is not None:
                source = dist.get_global_rank(place.replicas, layer.owner)
                work = dist.broadcast(made, source, group=place.replicas, async_op=True)
            works.append((work, layer, before, made))
        for work, layer, _, _ in works:
            if work is not None:
                place.watch.wait(work, f"the preconditioned gradient of {layer.name}", "from its owner")
        factor = self._shorter([(a, b) for _, _, a, b in works], place)
        for _, layer, _, made in works:
            layer.put(made.mul_(factor))

    def _of_owner(self, layer: Curved, before: Tensor, step: int) -> Tensor:
        if not layer.finite:  # the step is refused or skipped for its norm, as ever; the averages stay clean
            layer.a.forget()
            layer.g.forget()
            return torch.full_like(before, float("nan"), memory_format=SOLID)
        if layer.a.mean is None or layer.g.mean is None:  # only other replicas ran this layer so far
            return before.contiguous()
        if layer.inverse is None or step % self.every == 0:
            layer.inverse = inverses(layer.a.mean, layer.g.mean, self.damping)
        of_a, of_g = layer.inverse
        return (of_g @ before.to(of_g.dtype) @ of_a).to(before.dtype).contiguous()

    def _share(self, layer: Curved, place: Place) -> None:
        for factor in (layer.a, layer.g):
            if factor.total is None:
                raise ValueError(f"share_factors needs every replica to run {layer.name} in every step: leave it out")
            work = dist.all_reduce(factor.total, group=place.replicas, async_op=True)
            place.watch.wait(work, f"the factors of {layer.name}", "with the replicas")
            factor.total /= place.count

    def _shorter(self, pairs: list[tuple[Tensor, Tensor]], place: Place) -> float:
        """What bounds the step: sqrt(kl_clip / sum of gradient times preconditioned gradient times rate^2)."""
        if self.kl_clip is None:
            return 1.0
        mine = sum(float((a.double() * b.double()).sum()) for a, b in pairs) if self._mine == 0 else 0.0
        total = agree_on({"length": mine}, place.world, place.watch)["length"]
        rate = place.optimizer.param_groups[0]["lr"] if place.optimizer is not None else 1.0
        length = abs(total) * float(rate) ** 2
        return min(1.0, (self.kl_clip / length) ** 0.5) if length > 0 else 1.0


def inverses(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping))^-1 and (G + sqrt(damping) / pi)^-1, pi^2 the ratio of their mean eigenvalues."""
    of_a, of_g = a.trace() / len(a), g.trace() / len(g)
    pi = float((of_a / of_g).sqrt()) if of_a > 0 and of_g > 0 else 1.0
    return _inverse(a, pi * damping**0.5), _inverse(g, damping**0.5 / pi)


def _inverse(matrix: Tensor, more: float) -> Tensor:
    damped = matrix + more * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def owners_of(sizes: Mapping[str, int], replicas: int) -> dict[str, int]:
    """Which replica owns each layer: the largest first, each to the one that has least."""
    load = [0] * replicas
    found: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        found[name] = min(range(replicas), key=load.__getitem__)
        load[found[name]] += sizes[name]
    return found


def _bytes(weight: Tensor) -> int:
    """Of both factors of a layer, nearly: whether it has a bias shows when it runs."""
    return (weight.shape[0] ** 2 + weight[0].numel() ** 2) * weight.element_size()


def _fits(found: Operands) -> bool:
    """Linear layers, and two-dimensional convolutions that are neither grouped nor transposed."""
    if found.weight.ndim == 2:
        return found.x.ndim > 1
    return found.weight.ndim == 4 and not found.options[3] and found.options[5] == 1


def _rows_in(found: Operands) -> Tensor:
    """The layer's input as rows: for a convolution, the patches under its kernel."""
    x = found.x.detach()
    if found.weight.ndim == 2:
        return x.flatten(0, -2)
    stride, padding, dilation = found.options[:3]
    patches = F.unfold(x, found.weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
    return patches.transpose(1, 2).flatten(0, 1)
