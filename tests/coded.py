"""What the ranks do in the tests of codecs between stages: each against one process with the same codec at the cuts."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like import Engine
from merak_like.runtime.batches import rows, split
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.loopback import Loopback
from tests.scenarios import PARTS, SAMPLES, agree, leads, plain_loss
from tests.training import SEED, Step, Subject, Trained, engine, plainly, subject, worst

WIDTH = 16


class Layer(nn.Module):
    """What tensor parallelism divides, in a chain: one value crosses between any two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


def chain(depth: int = 4) -> Subject:
    """A model whose cuts are between modules, so that plain PyTorch can be told of them by hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(depth))).double()

    def batch(samples: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(samples)
        return {"input": torch.randn(samples, 3, WIDTH, dtype=torch.float64, generator=random)}

    return Subject(model, batch, lambda outputs, _: outputs.square().sin().mean(), rows)


def cuts(ours: Engine) -> Iterator[tuple[str, int, int]]:
    """The module behind which each cut between two ranks is, and the stages on both sides."""
    plan = ours.plan
    made = {op.outputs[0].name: op for op in ours._programs.planned.graph.ops if op.outputs}
    assert len(plan.crossings) == len(plan.stages) - 1, "more than one value crosses a cut"
    for crossing in plan.crossings:
        op, (target,) = made[crossing.value], crossing.targets
        if plan.stage_rank[crossing.source] != plan.stage_rank[target]:
            # over tensor-parallel ranks the trace has torch's functions, one in each of these modules
            path = op.target if op.kind == "module" else op.scope
            assert path, f"a cut behind {op.target}, which is in no module"
            yield path, crossing.source, target


def linked(
    one: Subject, text: str, places: list[tuple[str, int, int]], parts: int = PARTS, dp: int = 1,
    named: Sequence[Sequence[Sequence[int]]] = (),
) -> Subject:  # fmt: skip
    """The same subject, whose model sends these modules' results through a link of one process while it trains.

    Each replica has a link of its own. ``named`` are each step's samples, micro-batch by micro-batch.
    """
    model = copy.deepcopy(one.model)
    for path, source, target in places:
        digest = hashlib.sha256(f"{SEED}/{source}/{target}/0".encode()).digest()
        links = [Loopback(codec(text), codec(text)) for _ in range(dp)]
        through = partial(_through, links, Counter[str](), parts, int.from_bytes(digest[:7], "big"), named)
        model.get_submodule(path).register_forward_hook(through)
    return replace(one, model=model)


def _through(
    links: Sequence[Loopback], calls: Counter[str], parts: int, seed: int, named: Sequence[Sequence[Sequence[int]]],
    module: nn.Module, _: Any, x: Tensor,
) -> Tensor:  # fmt: skip
    if not module.training:
        return x
    step, micro_batch = divmod(calls["so far"], parts)
    calls["so far"] += 1
    samples = tuple(named[step][micro_batch]) if named else ()
    return links[micro_batch * len(links) // parts](x, Context(step, micro_batch, samples=samples, seed=seed))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The bytes that this process gives to ``isend``."""
    found, before = Counter[str](), dist.isend

    def isend(tensor: Tensor, *more: Any, **named: Any) -> Any:
        found["bytes"] += tensor.nbytes
        return before(tensor, *more, **named)

    dist.isend = isend
    try:
        yield found
    finally:
        dist.isend = before


def coded(text: str, dp: int, pp: int, tp: int = 1, schedule: str = "1f1b", **more: Any) -> float:
    """Steps in float64, and evaluations before and after: through no codec."""
    one = chain()
    batches, other = [one.batch(SAMPLES)] * 2, one.batch(PARTS)
    ours = engine(one, batches[0], dp, pp, PARTS // dp, tp=tp, schedule=schedule, codec=text, **more)
    places = [*cuts(ours)]
    steps, before = [], ours.evaluate(other).loss
    for batch in batches:
        result = ours.step(batch)
        steps.append(Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    trained, after = Trained(steps, ours.full_state_dict()), ours.evaluate(other).loss
    ours.close()
    assert len(places) >= pp - 1
    if leads():
        parts = split(other, PARTS)
        assert abs(before - plain_loss(one, one.model.state_dict(), parts)) < 1e-10
        assert abs(after - plain_loss(one, dict(trained.weights), parts)) < 1e-10
        assert worst(plainly(one, batches, PARTS).weights, trained.weights)[0] > 1e-6, "the codec did nothing"
    return agree(trained, lambda: plainly(linked(one, text, places), batches, PARTS))


def bytes_sent(text: str, dp: int, pp: int, each: list[int]) -> None:
    """What a step puts on the wire, counted where torch.distributed is given it: codes and scales, nothing beside.

    ``each`` are the bytes of a micro-batch that each of the two ranks sends.
    """
    one = chain()
    batch = one.batch(2 * PARTS)
    ours = engine(one, batch, dp, pp, PARTS, codec=text)
    with counted() as found:
        ours.step(batch)
    ours.close()
    assert found["bytes"] == PARTS * each[ours.groups.coord.pp]


EPOCH = 24
"""Samples of the data that is remembered: three batches, in another order each time."""


def visits(steps: int, size: int = EPOCH // 3) -> list[list[int]]:
    """The samples of each step's batch."""
    random = torch.Generator().manual_seed(5)
    orders = [torch.randperm(EPOCH, generator=random) for _ in range(-(-steps * size // EPOCH))]
    return [part.tolist() for part in torch.cat(orders).split(size)][:steps]


def remembered(
    text: str, dp: int, pp: int, tp: int = 1, schedule: str = "1f1b", parts: int = 4, epochs: int = 3, **more: Any
) -> float:
    """Epochs in float64 with a codec that remembers samples, an evaluation between them."""
    one = chain(max(4, 2 * pp))
    data, which = one.batch(EPOCH)["input"], visits(3 * epochs)
    batches = [{"input": data[rows]} for rows in which]
    ours = engine(one, batches[0], dp, pp, parts // dp, tp=tp, schedule=schedule, codec=text, **more)
    places, steps = [*cuts(ours)], []
    for batch, samples in zip(batches, which, strict=True):
        ours.evaluate(batch)
        result = ours.step(batch, samples=samples)
        steps.append(Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    trained = Trained(steps, ours.full_state_dict())
    ours.close()
    named = [split({"x": torch.tensor(samples)}, parts) for samples in which]
    ids = [[part["x"].tolist() for part in step] for step in named]
    if leads():
        assert worst(plainly(one, batches, parts).weights, trained.weights)[0] > 1e-6, "the codec did nothing"
    return agree(trained, lambda: plainly(linked(one, text, places, parts, dp, ids), batches, parts))


def visits_sent(text: str, dp: int, pp: int, each: list[list[int]]) -> None:
    """Bytes of a micro-batch that each of the two ranks sends, visit by visit; nothing beside them travels."""
    one = chain()
    batch = one.batch(2 * PARTS)
    ours = engine(one, batch, dp, pp, PARTS, codec=text)
    for visit in each:
        with counted() as found:
            ours.step(batch, samples=range(2 * PARTS))
        assert found["bytes"] == PARTS * visit[ours.groups.coord.pp], (found, visit)
    ours.close()


def as_without(name: str, dp: int, pp: int, tp: int = 1, schedule: str = "1f1b", **more: Any) -> None:
    """``identity`` is bit for bit no codec: masks, skips, random states and dropout included."""
    one = subject(name, dtype=torch.float32)
    batch = one.batch(4)
    found = []
    for text in (None, "identity"):
        ours = engine(one, batch, dp, pp, 2, tp=tp, schedule=schedule, codec=text, **more)
        found.append(([ours.step(batch).loss for _ in range(2)], ours.full_state_dict()))
        ours.close()
    (losses, weights), (others, theirs) = found
    assert losses == others
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


def real(name: str, dp: int, pp: int, codec: str) -> float:
    """A transformer learns through a coarse codec, and writes without it: the same on every rank."""
    one = subject(name, dropout=False, dtype=torch.float32)
    batch = one.batch(4)
    ours = engine(one, batch, dp, pp, 2, codec=codec)
    losses = [ours.step(batch).loss for _ in range(4)]
    said = ours.generate([[3, 1], [2]], max_new_tokens=3)
    told: list[Any] = [None] * (dp * pp)
    dist.all_gather_object(told, said)
    ours.close()
    assert losses[-1] < losses[0]
    assert all(other == said for other in told)
    return losses[0]
