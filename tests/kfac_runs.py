"""Trainings with K-FAC: by the engine, and by hooks on modules in one process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime.methods.kfac import Kfac

WIDTHS = (64, 256, 256, 10)
TARGET = 0.3
"""Of the training loss."""


class Mlp(nn.Sequential):
    """64-256-256-10, and its loss."""

    def __init__(self) -> None:
        layers = [nn.Linear(a, b) for a, b in pairwise(WIDTHS)]
        super().__init__(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), labels)


class Images(nn.Module):
    """A convolution with a bias, one without, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(54, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = torch.tanh(self.two(torch.tanh(self.one(x.view(-1, 1, 8, 8)))))
        return F.cross_entropy(self.head(x.flatten(1)), labels)


def model(kind: str = "mlp", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return (Mlp() if kind == "mlp" else Images()).to(dtype)


def batches(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Ten noisy classes in 64 features of very different sizes, the same for everyone."""
    made = torch.Generator().manual_seed(1)
    centres, mix = torch.randn(10, 64, generator=made), torch.randn(64, 64, generator=made) / 8
    sizes = torch.logspace(0, -2, 64)
    found: list[dict[str, Tensor]] = []
    for _ in range(count):
        labels = torch.randint(10, (size,), generator=made)
        x = (centres[labels] + 0.7 * torch.randn(size, 64, generator=made)) * sizes @ mix
        found.append({"x": x.to(dtype), "labels": labels})
    return found


def digits(count: int, size: int) -> list[dict[str, Tensor]]:
    """Batches of scikit-learn's digits."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found]

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(1797, generator=order)[:size] for _ in range(count)]
    return [{"x": x[some], "labels": y[some]} for some in chosen]


def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, rate)


def by_engine(
    one: nn.Module, data: list[dict[str, Tensor]], rate: float, *methods: Kfac, dp: int = 1, **more: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights at the end (on rank 0)."""
    engine = auto_parallel(
        one, dp, example=data[0], optimizer=sgd(rate), methods=methods, hardware="a100-80gb", device="cpu", timeout=60,
        **more,
    )  # fmt: skip
    losses = [engine.step(batch).loss for batch in data]
    weights = engine.full_state_dict()
    engine.close()
    return losses, weights


def by_hooks(
    one: nn.Module, data: list[dict[str, Tensor]], rate: float, damping: float, weight: float, clip: float
) -> dict[str, Tensor]:
    """Plain K-FAC from its formulas: hooks on modules, inverses by ``torch.linalg.inv``."""
    layers = [m for m in one.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    seen: dict[nn.Module, list[Tensor]] = {}
    means: dict[nn.Module, list[Tensor]] = {}

    def after(m: nn.Module, inputs: Any, made: Tensor) -> None:
        seen[m] = [inputs[0].detach()]
        made.register_hook(seen[m].append)

    for m in layers:
        m.register_forward_hook(after)
    optimizer = torch.optim.SGD(one.parameters(), rate)
    for step, batch in enumerate(data, 1):
        optimizer.zero_grad()
        seen.clear()
        one(**batch).backward()
        made: list[tuple[nn.Module, Tensor, Tensor]] = []
        for m in layers:
            x, g = seen[m]
            n = len(g)
            if isinstance(m, nn.Conv2d):
                x = F.unfold(x, m.kernel_size, padding=m.padding, stride=m.stride).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]
                g = g.permute(0, 2, 3, 1).flatten(0, 2)
            if m.bias is not None:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            new = [x.t() @ x / len(x), (n * g).t() @ (n * g) / n]
            old, share = means.get(m, new), max(weight, 1 / step)
            means[m] = [share * a + (1 - share) * b for a, b in zip(new, old, strict=True)]
            a, b = means[m]
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
            left = torch.linalg.inv(b + damping**0.5 / pi * torch.eye(len(b), dtype=b.dtype))
            right = torch.linalg.inv(a + damping**0.5 * pi * torch.eye(len(a), dtype=a.dtype))
            grad = m.weight.grad.flatten(1)  # type: ignore[union-attr]
            grad = grad if m.bias is None else torch.cat([grad, m.bias.grad[:, None]], 1)  # type: ignore[index,union-attr]
            made.append((m, grad, left @ grad @ right))
        length = sum(float((g * p).sum()) for _, g, p in made) * rate**2
        shorter = min(1.0, (clip / length) ** 0.5)
        for m, _, p in made:
            own = p if m.bias is None else p[:, :-1]
            m.weight.grad.copy_(shorter * own.reshape(m.weight.shape))  # type: ignore[union-attr]
            if m.bias is not None:
                m.bias.grad.copy_(shorter * p[:, -1])  # type: ignore[union-attr]
        optimizer.step()
    return {k: v.detach().clone() for k, v in one.state_dict().items()}


@contextmanager
def wire() -> Iterator[Counter[str]]:
    """Bytes given to each kind of collective."""
    sent: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather_into_tensor")}

    def counting(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **more: Any) -> Any:
            sent[name] += tensor.nbytes
            return before[name](tensor, *args, **more)

        return call

    try:
        for name in before:
            setattr(dist, name, counting(name))
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def steps_to_target(losses: list[float], target: float = TARGET) -> int:
    """Until the mean loss of the last three steps is below the target."""
    for step in range(2, len(losses)):
        if sum(losses[step - 2 : step + 1]) / 3 < target:
            return step + 1
    return len(losses) + 1


def on_ranks(
    dp: int, pp: int, kind: str, rate: float, steps: int, tp: int = 1, size: int = 128, data: str = "made", **more: Any
) -> dict[str, Any]:
    """One training: steps to the target, bytes on the wire of a step, factors of this rank."""
    methods = [] if kind == "sgd" else [Kfac(share_factors=kind == "mpd", **more)]
    some = batches(steps, size) if data == "made" else digits(steps, size)
    engine = auto_parallel(
        model(), dp, pp, tp, example=some[0], optimizer=sgd(rate), methods=methods, hardware="a100-80gb", device="cpu",
        timeout=60,
    )  # fmt: skip
    losses = [engine.step(some[0]).loss]
    with wire() as sent:
        losses.append(engine.step(some[1]).loss)
    begin = time.process_time()
    losses += [engine.step(batch).loss for batch in some[2:]]
    seconds = (time.process_time() - begin) / max(1, len(some) - 2)
    weights = engine.full_state_dict()
    engine.close()
    owned = methods[0].owned() if methods else ()
    held = methods[0].factor_bytes if methods else 0
    total = float(sum(w.double().square().sum() for w in weights.values())) if weights else 0.0
    return {
        "losses": losses, "steps": steps_to_target(losses), "sent": dict(sent), "owned": list(owned), "held": held,
        "cpu_ms": 1e3 * seconds, "weights": total,
    }  # fmt: skip
