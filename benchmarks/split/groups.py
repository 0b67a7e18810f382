"""How well do clients learn who train one cloud half together, in turns or in rounds, with SGLR and with SplitFed?

    pip install scikit-learn && OMP_NUM_THREADS=1 python -m benchmarks.split.groups     # minutes; goes on if stopped

One process computes what a host and its edges compute: who is due, who is drawn, rates and means are the package's own
functions, and the tests hold edges and a host on a network to the same formulas (tests/test_split_groups.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.split.groups import GroupText, Place, after, chosen, expected
from merak_like.split.layers import weighted
from merak_like.split.messages import OptimizerText
from merak_like.split.pooled import mean
from merak_like.split.training import OPTIMIZERS, rate

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
CLIENTS, SAMPLES, BATCH, STEPS = 20, 60, 10, 90
"""Each client has 60 samples, and sees each about 15 times."""
SPREADS = {"alike": 1.0, "apart": 0.2}
"""Of a client's samples, this part is drawn from all ten digits, the rest from two of its own."""
LEARNER = OptimizerText(name="adam", lr=1e-3)
ROWS: dict[str, dict[str, Any]] = {
    "in turns": {"mode": "sequential"},
    "in rounds": {"mode": "parallel"},
    "in rounds, alpha 0.5": {"mode": "parallel", "alpha": 0.5},
    "in rounds, alpha 1": {"mode": "parallel", "alpha": 1.0},
    "in rounds, phi 0.5": {"mode": "parallel", "phi": 0.5},
    "in rounds, alpha 0.5, phi 0.5": {"mode": "parallel", "alpha": 0.5, "phi": 0.5},
    "in rounds, average 5": {"mode": "parallel", "average": 5},
    "in rounds, alpha 0.5, average 5": {"mode": "parallel", "alpha": 0.5, "average": 5},
    "in turns, average 5": {"mode": "sequential", "average": 5},
}


@dataclass
class Client:
    """Its samples, its half and its optimizer."""

    x: Tensor
    y: Tensor
    half: nn.Module
    learner: torch.optim.Optimizer
    steps: int = 0
    since: int = 0
    """Samples trained on since the mean before."""


def clients(seed: int, spread: float) -> tuple[dict[str, Client], nn.Module, Tensor, Tensor]:
    """Clients, the cloud's half, and samples that no client has."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found]

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=draw)
    seen, unseen = order[360:], order[:360]
    torch.manual_seed(seed)
    front = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    cloud = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    found = {}
    for i in range(CLIENTS):
        own = seen[(y[seen] == i % 10) | (y[seen] == (3 * i + 1) % 10)]
        many = round(spread * SAMPLES)
        anything = seen[torch.randint(len(seen), (many,), generator=draw)]
        kept = torch.cat([anything, own[torch.randint(len(own), (SAMPLES - many,), generator=draw)]])
        half = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        half.load_state_dict(front.state_dict())  # all begin with the same layers, as from one checkpoint
        found[f"c{i:02}"] = Client(x[kept], y[kept], half, OPTIMIZERS["adam"](half.parameters(), LEARNER))
    return found, cloud, x[unseen], y[unseen]


def trained(row: dict[str, Any], seed: int, spread: float) -> float:
    """The mean accuracy of all clients' models on unseen samples of all digits."""
    found, cloud, unseen, answers = clients(seed, spread)
    text = GroupText.model_validate({"members": tuple(found), "optimizer": LEARNER, "seed": seed, **row})
    shared = list(cloud.parameters())
    learner, at = OPTIMIZERS["adam"](shared, LEARNER), Place()
    while min(client.steps for client in found.values()) < STEPS:
        who = expected(text, at)
        sent, back, gathered = dict[str, Tensor](), dict[str, dict[str, Tensor]](), dict[str, list[Tensor]]()
        for name in who:
            sent[name], back[name], gathered[name] = _to_the_cut(found[name], cloud, seed)
        mixed = chosen(text, at, who)
        common = mean([back[name] for name in mixed]) if mixed else {}
        for name in who:
            client = found[name]
            client.learner.zero_grad()
            sent[name].backward((common if name in mixed else back[name])["z"])
            client.learner.step()
            client.steps, client.since = client.steps + 1, client.since + BATCH
        for i, parameter in enumerate(shared):
            parameter.grad = torch.stack([gathered[name][i] for name in who]).mean(0)  # batches of one size
        for entry in learner.param_groups:
            entry["lr"] = rate(LEARNER, at.updates, float(len(who)) ** text.alpha)
        learner.step()
        at = after(text, at, who)
        if at.pending:
            _average(list(found.values()))
            at = replace(at, pending=False)
    with torch.no_grad():
        right = [(cloud(client.half(unseen)).argmax(1) == answers).float().mean() for client in found.values()]
    return float(torch.stack(right).mean())


def _to_the_cut(client: Client, cloud: nn.Module, seed: int) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """A step up to where the gradients of the edge's layers begin."""
    draw = torch.Generator().manual_seed(1000 * seed + client.steps // (SAMPLES // BATCH))
    part = torch.randperm(SAMPLES, generator=draw).split(BATCH)[client.steps % (SAMPLES // BATCH)]
    sent = client.half(client.x[part])
    leaf = sent.detach().requires_grad_()
    cloud.zero_grad()
    nn.functional.cross_entropy(cloud(leaf), client.y[part]).backward()
    assert leaf.grad is not None
    return sent, {"z": leaf.grad}, [p.grad.clone() for p in cloud.parameters() if p.grad is not None]


@torch.no_grad()
def _average(found: list[Client]) -> None:
    shares = [client.since / sum(each.since for each in found) for client in found]
    for name, tensor in found[0].half.state_dict().items():
        common = weighted(shares, [client.half.state_dict()[name] for client in found]).clone()
        for client in found:
            client.half.state_dict()[name].copy_(common)
        del tensor
    for client in found:
        client.since = 0


def main() -> None:
    """Run what ``groups.json`` does not have yet, and print the table."""
    torch.set_num_threads(1)
    path = HERE / "groups.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    for kind, spread in SPREADS.items():
        for name, row in ROWS.items():
            runs = known.setdefault(kind, {}).setdefault(name, [])
            for seed in SEEDS[len(runs) :]:
                runs.append(round(trained(row, seed, spread), 4))
                setting = {"clients": CLIENTS, "samples of each": SAMPLES, "batch": BATCH, "steps of each": STEPS,
                           "torch": torch.__version__}  # fmt: skip
                path.write_text(json.dumps({"setting": setting, "rows": known}, indent=1) + "\n")
                print(f"{kind:6} {name:32} {runs[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
