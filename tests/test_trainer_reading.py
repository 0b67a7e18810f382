"""A rank loads what its stages read of a batch and no more, and the numbers are those of one process."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merak_like.trainer.data.collate import Collate, stack
from merak_like.trainer.data.loader import Loader, Share
from merak_like.trainer.data.order import Order
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Evaluation, Logging, Optimizer, Parallelism, Settings, Training
from tests.ranks import Call, results_of, selected_calls

STEPS, BATCH, SAMPLES, LOOKS = 6, 8, 24, 10
IGNORED = -100


class Noted(Mapping[str, Tensor]):
    """A sample that counts which of its fields are read, as one would that lies on a disk."""

    def __init__(self, number: int, tokens: int, read: Counter[str]) -> None:
        made = torch.Generator().manual_seed(number)
        target = torch.randint(0, 3, (tokens,), generator=made)
        target[: number % tokens] = IGNORED
        self.fields = {"input": torch.randn(tokens, 4, generator=made).double(), "target": target}
        self.read = read

    def __getitem__(self, name: str) -> Tensor:
        self.read[name] += 1
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def longest(samples: list[Any]) -> dict[str, Tensor]:
    """Filled up to the longest: nearly every batch has a shape of its own, and none can be loaded in part."""
    taken = [dict(sample) for sample in samples]
    width = max(len(sample["target"]) for sample in taken)

    def fill(t: Tensor, value: float) -> Tensor:
        return torch.cat([t, t.new_full((width - len(t), *t.shape[1:]), value)])

    return {
        "input": torch.stack([fill(sample["input"], 0.0) for sample in taken]),
        "target": torch.stack([fill(sample["target"], IGNORED) for sample in taken]),
    }


def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over targets that are not ignored."""
    return cross_entropy(outputs.flatten(0, 1), batch["target"].flatten(), ignore_index=IGNORED)


def run(kind: str, dp: int, pp: int, tp: int = 1) -> tuple[list[float], list[float], dict[str, int]]:
    """Train and look; losses and evaluations, weights (on rank 0), and how often each field was read."""
    read = Counter[str]()
    torch.manual_seed(0)
    layers = (part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)))
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    tokens = (lambda i: 5 + i % 7) if kind == "longest" else (lambda i: 6)
    data = [Noted(i, tokens(i), read) for i in range(SAMPLES + LOOKS)]
    collate: Collate = longest if kind == "longest" else stack
    settings = Settings(
        training=Training(steps=STEPS, batch=BATCH), optimizer=Optimizer(lr=0.01), evaluation=Evaluation(every=3),
        parallelism=Parallelism(
            dp=dp, pp=pp, tp=tp, micro_batches=4 // dp, hardware="a100-80gb", device="cpu", timeout=60.0
        ),
        logging=Logging(every=1, console=False), folder=Path(tempfile.mkdtemp()),
    )  # fmt: skip
    trainer = Trainer(
        model, settings, data[:SAMPLES], data[SAMPLES:], collate=collate, loss_fn=loss,
        loss_weight=lambda part: int((part["target"] != IGNORED).sum()),
    )  # fmt: skip
    read.clear()  # every rank looks at the first batch, to know what it shall read
    trainer.train()
    weights = [x for tensor in trainer.engine.full_state_dict().values() for x in tensor.flatten().tolist()]
    trainer.close()
    numbers = [x for line in trainer.state.history for key, x in line.items() if key in ("loss", "eval_loss")]
    return numbers, weights, dict(read)


LAYOUTS = [("stack", 1, 3, 1), ("longest", 1, 3, 1), ("stack", 2, 2, 1), ("longest", 2, 2, 1), ("stack", 1, 2, 2)]
CALLS = [
    pytest.param(
        Call(f"{kind}-{dp}x{pp}x{tp}", f"{__name__}:run", {"kind": kind, "dp": dp, "pp": pp, "tp": tp}),
        id=f"{kind}-{dp}x{pp}x{tp}", marks=[pytest.mark.slow] * (pp < 3),
    )
    for kind, dp, pp, tp in LAYOUTS
]  # fmt: skip
ALL = STEPS * BATCH + 2 * LOOKS


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """One job for all selected tests of a size."""
    return results_of(selected_calls(request))


@pytest.mark.ranks
@pytest.mark.timeout(200)
@pytest.mark.parametrize("call", CALLS)
def test_a_rank_loads_what_its_stages_read(call: Call, result: Callable[[Call], list[Any]]) -> None:
    kind, dp, pp, tp = call.arguments.values()
    found = result(call)
    numbers, weights, _ = run(kind, 1, 1)
    assert all(one[0] == pytest.approx(numbers, rel=1e-10) for one in found)
    assert found[0][1] == pytest.approx(weights, rel=1e-10, abs=1e-10)
    everything, inputs, targets = {"input": ALL, "target": ALL}, {"input": ALL}, {"target": ALL}
    last = everything if kind == "longest" else targets
    first = [everything] + [inputs] * (tp - 1)
    assert [one[2] for one in found] == (first + [{}] * (pp - 2) * tp + [last] * tp) * dp


def test_a_dataset_that_can_leave_out_columns_does() -> None:
    """As one of ``datasets`` would: columns that nobody reads are not even decoded."""

    class Table(list[dict[str, int]]):
        def select_columns(self, names: list[str]) -> Table:
            return Table({name: row[name] for name in names} for row in self)

    table = Table({"image": i, "label": -i, "path": 0} for i in range(8))
    loader = Loader(table, list, Order(8, shuffle=False), 2, Share(names=frozenset({"label"})))
    assert isinstance(loader.own, Table)
    assert loader.at(2) == [{"label": -2}, {"label": -3}]
    assert Loader(table, list, Order(8), 2, Share(names=frozenset())).at(0) is None
