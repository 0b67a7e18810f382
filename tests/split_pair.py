"""A host and an edge in one process, over loopback, and the models they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import OptimizerText, Task
from tests import split_models
from tests.split_proxy import Proxy

CUTS = {
    "bert": "bert.encoder.layer.0:bert.pooler.dense", "gpt2": "transformer.h.0:transformer.ln_f",
    "llama": "model.layers.0:model.norm", "calm": "layers.0:layers.3",
}  # fmt: skip
ADAM, SGD = OptimizerText(lr=1e-3), OptimizerText(name="sgd", lr=0.1)


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name != "calm":
        pytest.importorskip("transformers")
    return getattr(split_models, name)()


def task(cut: str, **more: Any) -> Task:
    return Task(**{"cut": cut, "micro_batches": 2, "window": 2, "optimizer": ADAM, "checkpoint_every": 100, **more})


class Pair:
    """A host and an edge in one process, over loopback."""

    def __init__(self, folder: Path, model: nn.Module, batch: Any, what: Task, *, proxy: Proxy | None = None,
                 limits: Limits | None = None, scheme: str = "") -> None:  # fmt: skip
        self.source = Source(lambda: copy.deepcopy(model))
        self.host = Host(
            self.source, what.cut, listen=f"{scheme}127.0.0.1:0", folder=folder / "host", limits=limits
        ).start()
        self.proxy = proxy
        if proxy is not None:
            proxy.target = self.host.port
        port = proxy.port if proxy is not None else self.host.port
        connect = f"{scheme}127.0.0.1:{port}"
        self.edge = Edge(self.source, what, batch, connect=connect, folder=folder / "edge", patience=20)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of both halves."""
        (session,) = self.host.registry.live.values()
        own = set(session.training.made.own)
        state = session.training.made.model.state_dict(keep_vars=True)
        return {**{n: t.detach() for n, t in state.items() if n in own}, **self.edge.state_dict()}

    def close(self) -> None:
        self.edge.close()
        self.host.close()
        if self.proxy is not None:
            self.proxy.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        pairs.append(Pair(tmp_path / str(len(pairs)), *args, **kwargs))
        return pairs[-1]

    yield make
    for one in pairs:
        one.close()
