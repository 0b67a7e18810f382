"""A host with a group and its edges in one process, each edge in a thread; and one process that trains the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.split import keys
from merak_like.split.connection import Waits
from merak_like.split.edge import Edge
from merak_like.split.groups import GroupText, Place, expected
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.tls import Keys
from tests import split_models

CUT = "layers.0:layers.3"
MIDDLE = ("layers.1", "layers.2", "counted")
EDGES, SHARED = OptimizerText(name="sgd", lr=0.1, momentum=0.5), OptimizerText(name="adam", lr=0.01)
NAMES = ("ann", "bob", "eve")


def model() -> nn.Module:
    """In float64 without dropout."""
    return split_models.calm()[0].double()


def text(mode: str, *members: str, **more: Any) -> GroupText:
    """A group of these."""
    return GroupText.model_validate(
        {"mode": mode, "members": members, "optimizer": SHARED, "wait": 30.0, "checkpoint_every": 2, **more}
    )


def task(**more: Any) -> Task:
    """Of every member."""
    return Task(
        **{
            "cut": CUT,
            "micro_batches": 2,
            "window": 2,
            "optimizer": EDGES,
            "checkpoint_every": 2,
            "group": "ward",
            **more,
        }  # fmt: skip
    )


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    """The members' batches differ, in their sizes too."""
    found = split_models.tiny_batch(100 * NAMES.index(name) + step)
    return {key: tensor[: 8 - 2 * NAMES.index(name)] for key, tensor in found.items()}


def made_keys(folder: Path) -> Path:
    """Certificates for all."""
    keys.init(folder)
    keys.issue(folder, "host", hosts=["127.0.0.1"])
    for name in NAMES:
        keys.issue(folder, name)
    return folder


class Ward:
    """A host and its group."""

    def __init__(
        self, folder: Path, certificates: Path, group: GroupText, build: Callable[[], nn.Module] = model
    ) -> None:
        self.folder, self.certificates, self.group = folder, certificates, group
        whole = build()
        self.source = Source(lambda: copy.deepcopy(whole))
        self.limits = Limits(waits=Waits(hello=20, idle=30, step=60, drain=20))
        self.host = self.begin()

    def begin(self, port: int = 0) -> Host:
        """A host with the same folder."""
        self.host = Host(
            self.source, CUT, listen=f"127.0.0.1:{port}", folder=self.folder / "host", limits=self.limits,
            keys=Keys(self.certificates, "host"), groups={"ward": self.group},
        ).start()  # fmt: skip
        return self.host

    def edge(self, name: str, patience: float = 60.0, **more: Any) -> Edge:
        """A member's edge, not dialled yet."""
        return Edge(
            self.source, task(**more), batch_of(name, 0), connect=f"127.0.0.1:{self.host.port}",
            folder=self.folder / name, keys=Keys(self.certificates, name), patience=patience,
        )  # fmt: skip

    def train(self, edges: Mapping[str, Edge], steps: Mapping[str, int], **more: Any) -> dict[str, dict[int, float]]:
        """All at once, each in a thread; their losses by step."""
        losses: dict[str, dict[int, float]] = {name: {} for name in edges}

        def run(name: str) -> None:
            edges[name].train(
                lambda step: batch_of(name, step), steps[name],
                samples=lambda step: range(100 * (step % 2), 100 * (step % 2) + len(batch_of(name, step)["labels"])),
                on_step=lambda step, result: losses[name].__setitem__(step, result.loss), **more,
            )  # fmt: skip

        with ThreadPoolExecutor(len(edges), "edge") as pool:
            for future in [pool.submit(run, name) for name in edges]:
                future.result()
        return losses

    def weights(self, edges: Mapping[str, Edge]) -> dict[str, Tensor]:
        """The shared ones, and each edge's under its name."""
        common = self.host.registry.groups["ward"].common
        assert common is not None
        found = {n: t.detach().clone() for n, t in {**common.weights, **common.buffers}.items()}
        return found | {f"{k}/{n}": t.clone() for k, edge in edges.items() for n, t in edge.state_dict().items()}


def alone(group: GroupText, updates: int, blend: Callable[..., None] | None = None) -> tuple[dict, dict[str, Tensor]]:
    """What one process makes of the same batches: each member's own layers, and the layers that all have in common."""
    whole = model()
    models = {name: copy.deepcopy(whole) for name in group.members}
    first = models[group.members[0]]
    shared = [p for n, p in first.named_parameters() if n.startswith(MIDDLE)]
    learner = torch.optim.Adam(shared, lr=SHARED.lr)
    own = {
        k: torch.optim.SGD([p for n, p in m.named_parameters() if not n.startswith(MIDDLE)], lr=0.1, momentum=0.5)
        for k, m in models.items()
    }
    at, losses, steps = Place(), {name: {} for name in models}, dict.fromkeys(models, 0)
    for _ in range(updates):
        who = expected(group, at)
        gathered: dict[str, list[Tensor]] = {}
        buffers: dict[str, dict[str, Tensor]] = {}
        batches = {name: batch_of(name, steps[name]) for name in who}
        items = {name: len(batch["labels"]) for name, batch in batches.items()}
        for name in who:
            model_ = models[name]
            _share(first, model_)
            model_.train()
            own[name].zero_grad()
            cuts: list[Tensor] = []
            parts = [
                {k: v[i * items[name] // 2 : (i + 1) * items[name] // 2] for k, v in batches[name].items()}
                for i in (0, 1)
            ]
            losses[name][steps[name]] = 0.0
            for part in parts:
                loss = model_(**part)["loss"] * len(part["labels"]) / items[name]
                loss.backward()
                losses[name][steps[name]] += loss.item()
            gathered[name] = [p.grad.clone() for n, p in model_.named_parameters() if n.startswith(MIDDLE)]
            for parameter in model_.parameters():
                if any(parameter is p for p in []):
                    cuts.append(parameter)
            buffers[name] = {n: b.clone() for n, b in model_.named_buffers()}
            own[name].step()
            steps[name] += 1
        total = sum(items.values())
        for i, parameter in enumerate(shared):
            parameter.grad = sum(gathered[name][i] * (items[name] / total) for name in who)
        for entry in learner.param_groups:
            entry["lr"] = SHARED.lr * len(who) ** group.alpha
        learner.step()
        for n, b in first.named_buffers():
            each = [buffers[name][n] for name in who]
            b.copy_(
                sum(x * (items[name] / total) for name, x in zip(who, each, strict=True))
                if b.is_floating_point()
                else max(each)
            )
        from merak_like.split.groups import after

        at = after(group, at, who)
    found = {n: t for n, t in first.state_dict().items() if n.startswith(MIDDLE)}
    for k, m in models.items():
        found |= {f"{k}/{n}": t for n, t in m.state_dict().items() if not n.startswith(MIDDLE)}
    return losses, found


@torch.no_grad()
def _share(first: nn.Module, other: nn.Module) -> None:
    """The layers in common as they are now; gradients anew."""
    for n, t in first.state_dict().items():
        if n.startswith(MIDDLE) and first is not other:
            other.state_dict()[n].copy_(t)
    for n, p in other.named_parameters():
        if n.startswith(MIDDLE):
            p.grad = None


def furthest(found: Mapping[str, Tensor], expected_: Mapping[str, Tensor]) -> float:
    """The largest difference."""
    assert found.keys() == expected_.keys(), sorted(found.keys() ^ expected_.keys())
    return max(float((found[n].double() - t.double()).abs().max()) for n, t in expected_.items())
