"""What the ranks do in the tests of the engine. Each runs on every rank; what must hold is asserted after ``close``."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.runtime.batches import rows, split
from tests import training
from tests.rich import rich_plan
from tests.training import Subject, Trained, by_engine, engine, plainly, same, subject
from tests.zoo.case import Batch

PARTS = 8
"""Micro-batches of a step over all replicas: the same in every layout, so that one reference serves all."""
SAMPLES = 19
"""Not a multiple of 8: micro-batches of two and of three samples."""
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@lru_cache(maxsize=4)
def reference(
    name: str, dropout: bool, dtype: str, steps: int, samples: int
) -> tuple[Subject, list[Batch], Trained | None]:
    """A model, its batches and, on rank 0, what plain training makes of them."""
    one = subject(name, dropout=dropout, dtype=getattr(torch, dtype))
    batches = [one.batch(samples)] * steps
    return one, batches, plainly(one, batches, PARTS) if leads() else None


def leads() -> bool:
    """Whether this is rank 0, which compares."""
    return os.environ.get("RANK", "0") == "0"


def agree(ours: Trained, theirs: Callable[[], Trained], tolerance: float = 1e-10, **more: Any) -> float:
    """Compare on rank 0."""
    return same(ours, theirs(), tolerance, **more) if leads() else 0.0


def is_statistics(name: str) -> bool:
    """Batch norm's running statistics: each replica keeps those of its own micro-batches."""
    return "running_" in name or "num_batches_tracked" in name


def train(
    name: str, dp: int, pp: int, schedule: str, dropout: bool, dtype: str = "float64", steps: int = 5, **more: Any
) -> float:
    """One cell of the matrix: how far the engine is from plain training. Two axes at once take uneven micro-batches."""
    samples = SAMPLES if min(dp, pp) > 1 else 2 * PARTS
    one, batches, plain = reference(name, dropout, dtype, steps, samples)
    ours = by_engine(one, batches, dp, pp, PARTS // dp, schedule=schedule, **more)
    if plain is None:
        return 0.0
    assert plain.steps[0].norm > training.LIMIT, "clipping would have nothing to do"
    return same(ours, plain, TOLERANCE[dtype], lambda key: dp > 1 and is_statistics(key))


def rich(name: str, dp: int, pp: int, schedule: str, recompute: str) -> float:
    """One cell of the matrix of schedules: with micro-batches of two sizes and dropout."""
    one, batches, plain = reference(name, True, "float64", 2, SAMPLES)
    plan = rich_plan(one, batches[0], dp, pp, PARTS // dp, schedule, recompute)
    ours = by_engine(one, batches, dp, pp, PARTS // dp, plan=plan)
    return 0.0 if plain is None else same(ours, plain, 1e-10, lambda key: dp > 1 and is_statistics(key))


def other_shapes(name: str, dp: int, pp: int) -> float:
    """Every batch has another number of samples and of tokens: longer, shorter, as before, micro-batches of one."""
    one = subject(name)
    batches = [one.batch(size, length) for size, length in ((11, 14), (9, 20), (13, 9), (8, 14), (11, 20))]
    ours = by_engine(one, batches, dp, pp, PARTS // dp)
    return agree(ours, lambda: plainly(one, batches, PARTS))


def own_shares(name: str, dp: int, pp: int) -> float:
    """Every replica brings its own samples, not equally many."""
    one = subject(name)
    shares = [[one.batch(size, 12 + 2 * step) for size in (7, 4)] for step in range(3)]
    ours = engine(one, one.batch(8), dp, pp, 2)
    mine = ours.groups.coord.dp
    steps = []
    for share in shares:
        result = ours.step(share[mine], batch_is_global=False)
        steps.append(training.Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    trained = Trained(steps, ours.full_state_dict())
    ours.close()
    return agree(trained, lambda: plainly(one, shares, lambda share: [p for s in share for p in split(s, 2)]))


def evaluated(name: str, dp: int, pp: int, schedule: str) -> float:
    """Evaluation between the steps: the plain loss, and training goes on as if nothing had been."""
    one = subject(name)
    batches = [one.batch(SAMPLES)] * 3
    other = one.batch(10, *(() if name in ("vit", "unet") else (17,)))
    ours = engine(one, batches[0], dp, pp, PARTS // dp, schedule=schedule)
    steps, seen, states = [], [ours.evaluate(other)], [ours.full_state_dict()]
    modes = [m.training for m in ours.model.modules()]
    for batch in batches:
        result = ours.step(batch)
        before = {k: p.grad for k, p in ours.model.named_parameters() if p.grad is not None}
        copies = {k: g.clone() for k, g in before.items()}
        seen.append(ours.evaluate(other))
        states.append(ours.full_state_dict())
        kept = all(torch.equal(g, copies[k]) for k, g in before.items())
        steps.append(training.Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    trained = Trained(steps, ours.full_state_dict())
    ours.close()
    assert kept, "evaluation changed the gradients"
    assert modes == [m.training for m in ours.model.modules()], "evaluation left another mode"
    for result, state in zip(seen, states, strict=True):
        assert result.grad_norm == 0.0
        if leads():
            assert abs(result.loss - plain_loss(one, state, split(other, PARTS))) < 1e-10
    return agree(trained, lambda: plainly(one, batches, PARTS), skip=lambda key: dp > 1 and is_statistics(key))


@torch.no_grad()
def plain_loss(one: Subject, state: dict[str, Tensor], parts: list[Any]) -> float:
    """The loss of the plain model in evaluation mode with these weights."""
    model = copy.deepcopy(one.model).eval()
    model.load_state_dict(state)
    weights = [one.weight(part) for part in parts]
    losses = [one.loss(model, part).item() for part in parts]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


class Patchy(nn.Module):
    """Layers that are frozen, detached or never called; whole numbers and masks made early and used late."""

    def __init__(self, width: int = 8, depth: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.aside = nn.Linear(width, width)
        self.never = nn.Linear(width, width)
        self.head = nn.Linear(width, 20)
        for frozen in (self.layers[1], self.layers[depth - 2]):
            frozen.requires_grad_(False)
        self.shift: Tensor
        self.register_buffer("shift", torch.arange(width))
        self.register_buffer("unread", torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        odd, place = ids % 2 == 1, ids + 1
        h = self.table(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        h = h + self.aside(h).detach()
        h = h.masked_fill(odd[..., None], 0.5) + (place[..., None] % (self.shift + 2)).to(h.dtype)
        return self.head(h)


def patchy() -> Subject:
    """A Patchy model, predicting the token itself."""
    torch.manual_seed(0)

    def batch(size: int = 4, length: int = 6) -> Batch:
        return {"ids": torch.randint(0, 20, (size, length), generator=torch.Generator().manual_seed(1))}

    def loss(output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), batch["ids"].flatten())

    return Subject(Patchy().double().train(), batch, loss, rows)


def partly_trained(dp: int, pp: int) -> float:
    """Parameters without gradients stay without, frozen ones stay as they were, masks and whole numbers cross."""
    one = patchy()
    batches = [one.batch(13)] * 4
    ours = engine(one, batches[0], dp, pp, PARTS // dp, max_grad_norm=None)
    crossing = {crossing.dtype for crossing in ours.plan.crossings}
    ours.close()
    trained = by_engine(one, batches, dp, pp, PARTS // dp, max_grad_norm=None)
    assert pp == 1 or {"bool", "int64"} & crossing, f"only {crossing} cross"
    if leads():
        assert not any(name.startswith(("aside", "never", "layers.1.")) for name in trained.steps[0].gradients)
        assert "never.weight" in trained.weights
    return agree(trained, lambda: plainly(one, batches, PARTS, None))


def from_meta(name: str, dp: int, pp: int, tp: int = 1) -> dict[str, str]:
    """The weights that a model on the meta device gets in this layout, by name as digests, and after three steps."""
    with torch.device("meta"):
        one = subject(name, dtype=torch.float32)
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, tp=tp)
    first = ours.full_state_dict()
    losses = [ours.step(one.batch(SAMPLES)).loss for _ in range(3)]
    ours.close()
    assert all(torch.isfinite(torch.tensor(losses)))
    return {"losses": " ".join(f"{x:.4f}" for x in losses)} | {k: digest(v) for k, v in first.items()}


def digest(tensor: Tensor) -> str:
    """Equal for equal bits."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def read(name: str, dp: int, pp: int, folder: str, tp: int = 1) -> dict[str, str]:
    """The weights of a checkpoint, read by a model on the meta device, each rank its own part."""
    with torch.device("meta"):
        one = subject(name, dtype=torch.float32)
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, tp=tp, weights=folder)
    found = ours.full_state_dict()
    loss = ours.evaluate(one.batch(SAMPLES)).loss  # reads the buffers that no checkpoint has, too
    ours.close()
    return {"loss": f"{loss:.5f}"} | {k: digest(v) for k, v in found.items()}


def write(name: str, dp: int, pp: int, folder: str, tp: int = 1) -> list[float]:
    """Train two steps and save."""
    one = patchy() if name == "patchy" else subject(name, dtype=torch.float32)
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp, tp=tp)
    losses = [ours.step(one.batch(SAMPLES)).loss for _ in range(2)]
    ours.save_pretrained(Path(folder))
    there = any(Path(folder).glob("*.safetensors"))
    ours.close()
    assert there, "a rank came back before the files were there"
    return losses


def leaves_no_threads(dp: int, pp: int) -> None:
    """What an engine started is gone when the engine is closed and forgotten; Python's collector is not needed."""
    one = patchy()

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    counts = []
    gc.disable()
    for _ in range(4):
        ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp)
        ours.step(one.batch(SAMPLES))
        ours.close()
        del ours
        counts.append(threads())
    gc.enable()
    assert counts[-1] == counts[1], counts


def leaves_random_numbers_alone(dp: int, pp: int) -> None:
    """The user's own random numbers go on as if there were no engine, and do not change the engine's."""
    one = subject("gpt2")
    torch.manual_seed(11)
    wanted = torch.rand(6)
    torch.manual_seed(11)
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp)
    drawn = [torch.rand(2)]
    for _ in range(2):
        ours.step(one.batch(SAMPLES))
        ours.evaluate(one.batch(SAMPLES))
        drawn.append(torch.rand(2))
    ours.close()
    assert torch.equal(torch.cat(drawn), wanted)


def readable_gradients(dp: int, pp: int) -> None:
    """A rank's own gradients stay in ``grad`` until the next step; what cannot be trained has none."""
    one = patchy()
    ours = engine(one, one.batch(SAMPLES), dp, pp, PARTS // dp)
    ours.step(one.batch(SAMPLES))
    mine = {k: p.grad.clone() for k, p in ours.model.named_parameters() if p.grad is not None}
    full = ours.full_gradients()
    again = ours.full_gradients()
    ours.close()
    assert mine, "this rank has no gradient at all"
    if leads():
        assert all(torch.equal(grad, full[name]) for name, grad in mine.items())
        assert full.keys() == again.keys()
        assert dp * pp == 1 or pp == 1 or mine.keys() < full.keys()


def own_code_runs(dp: int, pp: int) -> float:
    """A compiled block and hooks: they run once for each micro-batch, on the stage that holds their layer."""
    one = patchy()
    for index in (2, 5):
        one.model.get_submodule("layers")[index] = torch.compile(  # type: ignore[index]
            one.model.get_submodule(f"layers.{index}"), backend="eager"
        )
    batches = [one.batch(2 * PARTS)] * 3  # one shape, traced before the hooks are there
    ours = engine(one, batches[0], dp, pp, PARTS // dp)
    calls = dict.fromkeys(range(8), 0)
    steps = []

    def hook(index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[index] += 1

        return count

    for index in calls:
        ours.model.get_submodule(f"layers.{index}").register_forward_hook(hook(index))
    for batch in batches:
        result = ours.step(batch)
        steps.append(training.Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    trained = Trained(steps, ours.full_state_dict())
    held = " ".join(ours.plan.stages[ours.groups.coord.pp].params)
    here = {index for index in calls if f"layers.{index}." in held}
    ours.close()
    expected = {i: 3 * PARTS // dp if i in here else 0 for i in calls}
    assert calls == expected, f"hooks ran {calls}, not {expected}"
    return agree(trained, lambda: plainly(one, batches, PARTS))


def under_autocast(name: str, dp: int, pp: int) -> float:
    """Mixed precision as the user switches it on around the step."""
    one = subject(name, dtype=torch.float32)
    batches = [one.batch(SAMPLES)] * 3
    with torch.autocast("cpu", torch.bfloat16):
        ours = by_engine(one, batches, dp, pp, PARTS // dp)
    exact = by_engine(one, batches, dp, pp, PARTS // dp)
    if not leads():
        return 0.0
    assert abs(ours.steps[0].loss - exact.steps[0].loss) > 1e-7, "autocast changed nothing"
    with torch.autocast("cpu", torch.bfloat16):
        theirs = plainly(one, batches, PARTS)
    # gradients of one weight from several micro-batches are added in another order: bfloat16 keeps 8 bits
    return same(ours, theirs, 2e-3)
