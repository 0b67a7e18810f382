"""A host with a group and its edges in one process, each edge in a thread; and one process that trains the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.runtime.batches import split
from merak_like.split import checkpoint, keys
from merak_like.split.connection import Waits
from merak_like.split.crew import Crew
from merak_like.split.edge import Edge
from merak_like.split.groups import GroupText, Place, after, chosen, expected
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


def made() -> tuple[nn.Module]:
    """As a process of its own builds it, in float32."""
    return (model().float(),)


def text(mode: str, *members: str, **more: Any) -> GroupText:
    """A group of these."""
    return GroupText.model_validate(
        {"mode": mode, "members": members, "optimizer": SHARED, "wait": 30.0, "checkpoint_every": 2, **more}
    )


def task(**more: Any) -> Task:
    """Of every member."""
    usual: dict[str, Any] = {
        "cut": CUT,
        "micro_batches": 2,
        "window": 2,
        "optimizer": EDGES,
        "checkpoint_every": 2,
        "group": "ward",
    }
    return Task(**{**usual, **more})


def batch_of(name: str, step: int, *, even: bool = False) -> dict[str, Tensor]:
    """The members' batches differ, in their sizes too unless they are ``even``."""
    found = split_models.tiny_batch(100 * NAMES.index(name) + step)
    return {key: tensor[: 8 - (0 if even else 2 * NAMES.index(name))] for key, tensor in found.items()}


def made_keys(folder: Path) -> Path:
    """Certificates for all."""
    keys.init(folder)
    keys.issue(folder, "host", hosts=["127.0.0.1"])
    for name in NAMES:
        keys.issue(folder, name)
    return folder


class Ward:
    """A group and its edges; the host is here, or elsewhere at a port."""

    def __init__(
        self,
        folder: Path,
        certificates: Path,
        group: GroupText,
        *,
        port: int = 0,
        even: bool = False,
        dtype: torch.dtype = torch.float64,
        crew: Crew | None = None,
    ) -> None:
        self.crew = crew
        self.folder, self.certificates, self.group, self.even = folder, certificates, group, even
        whole = model().to(torch.float32 if port else dtype)
        self.source = Source(lambda: copy.deepcopy(whole))
        self.host, self.port = None, port
        self.edges: dict[str, Edge] = {}
        self.ways: dict[str, int] = {}
        """Another port than the host's, by member."""
        if not port:
            self.serve()

    def serve(self) -> None:
        """A host, at the port of the one before if there was one."""
        self.host = Host(
            self.source, CUT, listen=f"127.0.0.1:{self.port}", folder=self.folder / "host",
            keys=Keys(self.certificates, "host"), groups={"ward": self.group}, crew=self.crew,
            limits=Limits(waits=Waits(hello=20, idle=30, step=60, drain=20)),
        ).start()  # fmt: skip
        self.port = self.host.port

    def __enter__(self) -> Ward:
        return self

    def __exit__(self, *_: object) -> None:
        for edge in self.edges.values():
            edge.close()
        if self.host is not None:
            self.host.close()

    def edge(self, name: str, *, patience: float = 60.0, folder: str = "", **more: Any) -> Edge:
        """A member's edge, not dialled yet."""
        more = {"average_edges": bool(self.group.average), **more}
        port = self.ways.get(name, self.port)
        self.edges[name] = Edge(
            self.source, task(**more), batch_of(name, 0, even=self.even), connect=f"127.0.0.1:{port}",
            folder=self.folder / (folder or name), keys=Keys(self.certificates, name), patience=patience,
        )  # fmt: skip
        return self.edges[name]

    def train(self, **steps: int) -> dict[str, dict[int, float]]:
        """All at once, each in a thread, until they have done so many steps; their losses by step."""
        losses: dict[str, dict[int, float]] = {name: {} for name in steps}

        def run(name: str) -> None:
            self.edges[name].train(
                lambda step: batch_of(name, step, even=self.even), steps[name],
                samples=lambda step: range(len(batch_of(name, step, even=self.even)["labels"])),
                on_step=lambda step, result: losses[name].__setitem__(step, result.loss),
            )  # fmt: skip

        with ThreadPoolExecutor(len(steps), "edge") as pool:
            for future in [pool.submit(run, name) for name in steps]:
                future.result()
        return losses

    @property
    def weights(self) -> dict[str, Tensor]:
        """The shared ones, and each edge's under its name."""
        assert self.host is not None
        common = self.host.registry.groups["ward"].common
        assert common is not None
        found = {n: t.detach().clone() for n, t in {**common.weights, **common.buffers}.items()}
        return found | {f"{k}/{n}": t.clone() for k, edge in self.edges.items() for n, t in edge.state_dict().items()}

    def kept(self) -> dict[str, Tensor]:
        """The same from the newest checkpoints of the host and of the edges."""

        def newest(folder: Path) -> dict[str, Tensor]:
            return dict(checkpoint.load(folder, checkpoint.whole(folder)[-1]).tensors)

        found = newest(self.folder / "host/groups/ward")
        found = {n: t for n, t in found.items() if n.startswith(("weights/", "buffers/", "optimizer/"))}
        edges = {f"{k}/{n}": t for k in self.edges for n, t in newest(self.folder / k).items()}
        named = (".samples", ".order")  # ids under a secret that each edge draws
        return found | {n: t for n, t in edges.items() if not n.endswith(named)}


def alone(
    group: GroupText, updates: int, *, even: bool = False
) -> tuple[dict[str, dict[int, float]], dict[str, Tensor]]:
    """What one process makes of the same batches: each member's own layers, and the layers that all have in common.

    Each micro-batch is computed up to the cut and from there on, so that gradients can be put together at the cut.
    """
    whole = model()
    models: dict[str, Any] = {name: copy.deepcopy(whole) for name in group.members}
    first = models[group.members[0]]
    shared = [p for n, p in first.named_parameters() if n.startswith(MIDDLE)]
    learner = torch.optim.Adam(shared, lr=SHARED.lr)
    own = {
        k: torch.optim.SGD([p for n, p in m.named_parameters() if not n.startswith(MIDDLE)], lr=0.1, momentum=0.5)
        for k, m in models.items()
    }
    losses: dict[str, dict[int, float]] = {name: {} for name in models}
    at, steps, since = Place(), dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    for _ in range(updates):
        who = expected(group, at)
        now = {n: t.clone() for n, t in first.state_dict().items() if n.startswith(MIDDLE)}
        items: dict[str, int] = {}
        gathered, buffers = dict[str, list[Tensor]](), dict[str, dict[str, Tensor]]()
        sent, back = dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        for name in who:
            member, batch = models[name], batch_of(name, steps[name], even=even)
            _share(now, member)
            own[name].zero_grad()
            items[name], losses[name][steps[name]] = len(batch["labels"]), 0.0
            sent[name], back[name] = [], []
            for part in split(batch, 2):
                z = member.layers[0](member.token(part["input_ids"]))
                leaf = z.detach().requires_grad_()
                loss = _from_cut(member, leaf, part["labels"]) * len(part["labels"]) / items[name]
                loss.backward()
                losses[name][steps[name]] += loss.item()
                assert leaf.grad is not None
                sent[name].append(z)
                back[name].append(leaf.grad)
            gathered[name] = [
                p.grad.clone() for n, p in member.named_parameters() if n.startswith(MIDDLE) and p.grad is not None
            ]
            buffers[name] = {n: b.clone() for n, b in member.named_buffers()}
        mixed = chosen(group, at, who)
        means = [sum(each) / len(mixed) for each in zip(*(back[name] for name in mixed), strict=True)]
        for name in who:
            for i, z in enumerate(sent[name]):
                z.backward(means[i] if name in mixed else back[name][i])
            own[name].step()
            steps[name] += 1
        shares = [items[name] / sum(items.values()) for name in who]
        for i, parameter in enumerate(shared):
            parameter.grad = sum((gathered[k][i] * s for k, s in zip(who, shares, strict=True)), torch.zeros(()))
        for entry in learner.param_groups:
            entry["lr"] = SHARED.lr * len(who) ** group.alpha
        learner.step()
        for n, b in first.named_buffers():
            each = [buffers[name][n] for name in who]
            mean = sum((x * s for x, s in zip(each, shares, strict=True)), torch.zeros(()))
            b.copy_(mean if b.is_floating_point() else max(each))
        for name in who:
            since[name] += items[name]
        at = after(group, at, who)
        if at.pending:
            _average(models, since)
            at, since = replace(at, pending=False), dict.fromkeys(models, 0)
    found = {n: t for n, t in first.state_dict().items() if n.startswith(MIDDLE)}
    for k, m in models.items():
        found |= {f"{k}/{n}": t for n, t in m.state_dict().items() if not n.startswith(MIDDLE)}
    return losses, found


@torch.no_grad()
def _average(models: Mapping[str, nn.Module], since: Mapping[str, int]) -> None:
    """Every member's own layers become their mean, weighted by the samples each was trained on."""
    states = {k: dict(m.named_parameters()) for k, m in models.items()}
    own = [n for n in next(iter(states.values())) if not n.startswith(MIDDLE)]
    means = {n: sum((state[n] * since[k] for k, state in states.items()), torch.zeros(())) for n in own}
    for state in states.values():
        for n in own:
            state[n].copy_(means[n] / sum(since.values()))


def _from_cut(model_: Any, x: Tensor, labels: Tensor) -> Tensor:
    """The rest of ``Tiny``'s forward."""
    x = model_.layers[1](x)
    x = model_.counted(x.transpose(1, 2)).transpose(1, 2)
    x = model_.layers[3](model_.layers[2](x))
    return nn.functional.cross_entropy(model_.head(x.mean(1)), labels)


@torch.no_grad()
def _share(now: Mapping[str, Tensor], other: nn.Module) -> None:
    """The layers in common as they are now; gradients anew."""
    for n, t in now.items():
        other.state_dict()[n].copy_(t)
    for n, p in other.named_parameters():
        if n.startswith(MIDDLE):
            p.grad = None


def furthest(found: Mapping[str, Tensor], expected_: Mapping[str, Tensor]) -> float:
    """The largest difference."""
    assert found.keys() == expected_.keys(), sorted(found.keys() ^ expected_.keys())
    return max(float((found[n].double() - t.double()).abs().max()) for n, t in expected_.items())
