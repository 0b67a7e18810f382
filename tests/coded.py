"""What the ranks do in the tests of codecs between stages: each against one process with the same codec at the cuts."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.tracer import trace
from merak_like.runtime.batches import rows, split
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.loopback import Loopback
from tests.scenarios import PARTS, SAMPLES, agree, leads, plain_loss
from tests.training import SEED, Step, Subject, Trained, engine, plainly, subject

WIDTH = 16


class Layer(nn.Module):
    """What tensor parallelism divides, in a chain: one value crosses between any two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


def chain(depth: int = 8) -> Subject:
    """A model whose cuts are between modules, so that plain PyTorch can be told of them by hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(depth))).double()

    def batch(samples: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(samples)
        return {"input": torch.randn(samples, 3, WIDTH, dtype=torch.float64, generator=random)}

    return Subject(model, batch, lambda outputs, _: outputs.square().sin().mean(), rows)


def cuts(plan: Plan, one: Subject, example: Any) -> Iterator[tuple[str, int, int]]:
    """The module behind which each cut between two ranks is, and the stages on both sides."""
    made = {op.outputs[0].name: op for op in trace(one.model, example, one.loss_fn, device="cpu").graph.ops if op.outputs}
    assert len(plan.crossings) == len(plan.stages) - 1, "more than one value crosses a cut"
    for crossing in plan.crossings:
        assert made[crossing.value].kind == "module", made[crossing.value]
        (target,) = crossing.targets
        if plan.stage_rank[crossing.source] != plan.stage_rank[target]:
            yield made[crossing.value].target, crossing.source, target


def linked(one: Subject, text: str, places: list[tuple[str, int, int]], parts: int = PARTS) -> tuple[Subject, Counter[str]]:
    """The same subject, whose model sends these modules' results through a link of one process.

    Besides a clock: its "step" is the one that evaluations are made in.
    """
    model, clock = copy.deepcopy(one.model), Counter[str]()
    for path, source, target in places:
        seed = hashlib.sha256(f"{SEED}/{source}/{target}/0".encode()).digest()[:7]
        link, calls = Loopback(codec(text), codec(text)), Counter[bool]()

        def through(
            module: nn.Module, _: Any, x: Tensor, link: Loopback = link, calls: Counter[bool] = calls,
            seed: int = int.from_bytes(seed, "big"),
        ) -> Tensor:  # fmt: skip
            step, micro_batch = divmod(calls[module.training], parts)
            calls[module.training] += 1
            step = step if module.training else clock["step"]
            return link(x, Context(step, micro_batch, seed=seed, training=module.training))

        model.get_submodule(path).register_forward_hook(through)
    return replace(one, model=model), clock


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


def coded(text: str, dp: int, pp: int, tp: int = 1, schedule: str = "1f1b", samples: int = SAMPLES, **more: Any) -> float:
    """Steps and evaluations between them, in float64."""
    one = chain()
    batches, other = [one.batch(samples)] * 3, one.batch(10)
    ours = engine(one, batches[0], dp, pp, PARTS // dp, tp=tp, schedule=schedule, codec=text, **more)
    places = [*cuts(ours.plan, one, split(batches[0], PARTS)[0])]
    steps, seen = [], [ours.evaluate(other)]
    states = [ours.full_state_dict()]
    for batch in batches:
        result = ours.step(batch)
        steps.append(Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
        seen.append(ours.evaluate(other))
        states.append(ours.full_state_dict())
    trained = Trained(steps, states[-1])
    ours.close()
    assert len(places) >= pp - 1
    reference, clock = linked(one, text, places)
    if leads():
        for step, (result, state) in enumerate(zip(seen, states, strict=True)):
            clock["step"] = step
            assert abs(result.loss - plain_loss(reference, state, split(other, PARTS))) < 1e-10
    return agree(trained, lambda: plainly(reference, batches, PARTS))


def bytes_sent(text: str, dp: int, pp: int, per_value: int) -> int:
    """What a step puts on the wire, counted where torch.distributed is given it: codes and scales, nothing beside."""
    one = chain()
    batch = one.batch(2 * PARTS)
    ours = engine(one, batch, dp, pp, PARTS, codec=text)
    with counted() as found:
        ours.step(batch)
    assert found["bytes"] == PARTS * per_value
    ours.close()
    return found["bytes"]


def as_without(name: str, dp: int, pp: int, schedule: str) -> None:
    """``identity`` is bit for bit no codec: masks, skips, random states and dropout included; text, too."""
    one = subject(name, dtype=torch.float32)
    batches = [one.batch(SAMPLES)] * 2
    found = []
    for text in (None, "identity"):
        ours = engine(one, batches[0], dp, pp, PARTS, schedule=schedule, codec=text)
        losses = [ours.step(batch).loss for batch in batches] + [ours.evaluate(batches[0]).loss]
        said = ours.generate([[3, 1], [2]], max_new_tokens=3) if name == "gpt2" else []
        found.append((losses, said, ours.full_state_dict()))
        ours.close()
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2].values(), found[1][2].values(), strict=True))


def real(name: str, dp: int, pp: int, codec: str) -> float:
    """A transformer through a coarse codec learns, and writes the same on every rank."""
    one = subject(name, dropout=False, dtype=torch.float32)
    batch = one.batch(SAMPLES)
    ours = engine(one, batch, dp, pp, PARTS, codec=codec)
    losses = [ours.step(batch).loss for _ in range(4)]
    said = ours.generate([[3, 1], [2]], max_new_tokens=3)
    told: list[Any] = [None] * (dp * pp)
    dist.all_gather_object(told, said)
    ours.close()
    assert losses[-1] < losses[0]
    assert all(other == said for other in told)
    return losses[0]


def mask_is_refused(dp: int, pp: int) -> None:
    """T5's bias has its mask added: a scale for the one would lose the other, and training would be of no use."""
    one = subject("t5", dropout=False, dtype=torch.float32)
    batch = one.batch(2 * PARTS)
    ours = engine(one, batch, dp, pp, PARTS, codec="int8")
    try:
        ours.step(batch)
        raised = ""
    except Exception as error:
        raised = str(error)
    ours._watch.close()
    assert "would leave nothing of" in raised or ours.groups.coord.pp, raised
