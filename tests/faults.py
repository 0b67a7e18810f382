"""What the ranks do in the tests of faults: small plain models, and one rank that goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from merak_like import Engine, auto_parallel
from merak_like.runtime import watch
from merak_like.trainer.lookout import check
from tests import training
from tests.ranks import here
from tests.scenarios import leads, patchy
from tests.training import Subject, adamw, plainly, same


def rank() -> int:
    """Of this process."""
    return int(os.environ["RANK"])


class Small(nn.Module):
    """Some layers of the same kind."""

    def __init__(self, depth: int = 8, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def mean_square(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a Small."""
    return (output - batch["x"]).square().mean()


def items(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A batch for a Small."""
    return {"x": torch.randn(size, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def small(dp: int, pp: int, *, depth: int = 8, weights_of: int = 0, **more: Any) -> Engine:
    """An engine for a Small of eight layers."""
    torch.manual_seed(weights_of)
    settings: dict[str, Any] = {"seed": 3, "micro_batches": 2, "max_grad_norm": 1.0, "loss_fn": mean_square} | more
    settings = {"timeout": 60.0, "example": items(), "optimizer": adamw, "device": "cpu"} | settings
    return auto_parallel(Small(depth).double(), dp, pp, hardware="a100-80gb", **settings)


def refusal(build: Callable[[], Any]) -> str:
    """The message of the ValueError that it must raise; no watch may go on without an engine."""
    try:
        build()
    except ValueError as error:
        watching = [thread.name for thread in threading.enumerate() if thread.name == "merak-watch"]
        assert not watching, "a watch still runs"
        return str(error)
    raise AssertionError("nothing was refused")


def refused(what: str, dp: int, pp: int) -> str:
    """One thing after the other that must be refused on every rank, in the same processes."""
    odd = rank() == 2
    wrong: dict[str, Callable[[], Any]] = {
        "world": lambda: small(dp + 1, pp),
        "stages": lambda: small(1, dp * pp, depth=1, loss_fn=lambda output, batch: output.mean()),
        "batch": lambda: small(dp, pp, example=items(3)),
        "seed": lambda: small(dp, pp, seed=4 if odd else 3),
        "schedule": lambda: small(dp, pp, schedule="gpipe" if odd else "1f1b"),
        "clipping": lambda: small(dp, pp, max_grad_norm=2.0 if odd else 1.0),
        "model": lambda: small(dp, pp, depth=9 if odd else 8),
        "weights": lambda: small(dp, pp, weights_of=1 if odd else 0),
    }
    return refusal(wrong[what])


def all_is_well(dp: int, pp: int) -> float:
    """An engine after others were refused."""
    engine = small(dp, pp)
    loss = engine.step(items()).loss
    engine.close()
    return loss


def come_apart(dp: int, pp: int) -> list[str]:
    """One rank's memory loses a bit between two steps."""
    said = []
    engine = small(dp, pp)
    for number in range(2):
        engine.step(items())
        try:
            check(engine, engine.steps)
        except RuntimeError as error:
            said.append(str(error))
        if number == 0 and rank() == 2:
            next(iter(engine._parameters.values())).data.view(-1)[0] += 1e-9
    engine.close()
    return said


def not_a_number(dp: int, pp: int, where: str) -> list[str]:
    """A batch with a NaN or an infinity: every rank refuses it, and training goes on as if it had never been."""
    one = patchy() if where == "gradient" else Subject(small_model(), items, mean_square, len_of)
    batches = [one.batch(16)] * 3
    engine = training.engine(one, batches[0], dp, pp, 8 // dp)
    bad: Any = {k: v.clone() for k, v in batches[0].items()}
    steps, message = [], ""
    for number, batch in enumerate(batches):
        if number == 1:
            before = {k: p.detach().clone() for k, p in engine.model.named_parameters() if not p.is_meta}
            hook = None
            if where == "loss":
                bad["x"][5] = float("nan")
            else:
                hook = next(iter(engine._parameters.values())).register_hook(lambda grad: grad * float("inf"))
            try:
                engine.step(bad)
            except FloatingPointError as error:
                message = str(error)
            unchanged = all(torch.equal(p, before[k]) for k, p in engine.model.named_parameters() if k in before)
            if hook is not None:
                hook.remove()
        result = engine.step(batch)
        steps.append(training.Step(result.loss, result.grad_norm, result.tokens, engine.full_gradients()))
    trained = training.Trained(steps, engine.full_state_dict())
    engine.close()
    assert unchanged, "the weights changed"
    if leads():
        same(trained, plainly(one, batches, 8), 1e-10)
    return [message]


def small_model() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return Small().double().train()


def len_of(batch: dict[str, Tensor]) -> int:
    """Samples."""
    return len(batch["x"])


def nothing_to_learn(dp: int, pp: int) -> list[str]:
    """A batch whose every label is ignored, and one replica's share of a batch."""
    said = []
    engine = small(dp, pp, loss_weight=lambda batch: int((batch["x"][:, 0] > -50).sum()))
    whole = items(16)
    whole["x"][16 - 16 // dp :, 0] = -99.0
    engine.step(whole)  # the last replica has nothing, the others have
    try:
        engine.step({"x": torch.full_like(whole["x"], -99.0)})
    except ValueError as error:
        said.append(str(error))
    part = 16 // dp
    mine = engine.groups.coord.dp
    share = {"x": whole["x"][mine * part : (mine + 1) * part]}
    try:
        engine.step(share, batch_is_global=False)
    except ValueError as error:
        said.append(str(error))
    engine.step(items(16))
    engine.close()
    return said


# ------------------------------------------------------------------------------------- processes that are lost, in bare


def train_on(dp: int, pp: int, timeout: float = 60.0, steps: int = 100_000, **more: Any) -> None:
    """Train until something happens."""
    engine = small(dp, pp, timeout=timeout, **more)
    for number in range(steps):
        engine.step(items(seed=number))
        if number == 3:
            here("training")
    engine.close()
    here("done")


def raise_on_one(dp: int, pp: int, victim: int) -> None:
    """One stage's forward raises in the third step."""
    engine = small(dp, pp)

    def fail(*_: Any) -> None:
        if engine.steps == 2:
            raise KeyError("a bug of the model")

    if victim == rank():
        for module in engine.model.modules():
            module.register_forward_pre_hook(fail)
    for number in range(10):
        engine.step(items(seed=number))


def leave_it_open(dp: int, pp: int) -> None:
    """The script ends without ``close``, while the watch is at the store nearly all the time."""
    watch.INTERVAL = 1e-4
    small(dp, pp).step(items())


def plan_on_all_but_one(dp: int, pp: int, victim: int) -> None:
    """One rank is given a batch that cannot be planned with."""
    small(dp, pp, example=items(1) if victim == rank() else items())


def stop_early(dp: int, pp: int, victim: int) -> None:
    """One rank's loop is shorter."""
    engine = small(dp, pp)
    for number in range(4 if victim == rank() else 10):
        engine.step(items(seed=number))
    if victim != rank():
        engine.close()


def kill_itself(dp: int, pp: int, victim: int) -> None:
    """One rank dies in the third step, as if the kernel had killed it for its memory."""
    engine = small(dp, pp)

    def die(*_: Any) -> None:
        if engine.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    if victim == rank():
        for module in engine.model.modules():
            module.register_forward_pre_hook(die)
    for number in range(10):
        engine.step(items(seed=number))
