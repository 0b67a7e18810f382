"""AdaSplit: an edge that is told nothing, a server that hears some, masks that keep clients apart."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from merak_like.split.adasplit import AdaSplit, Masked, Settings, contrastive
from merak_like.split.choosing import Chooser
from merak_like.split.score import Spent, note
from merak_like.trainer.report import read_metrics, summary

CLIENTS = 4


def batches(epoch: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Two of eight classes for each client, as blobs around a centre each."""
    centres = torch.randn(8, 12, generator=torch.Generator().manual_seed(9)) * 2
    drawn = torch.Generator().manual_seed(epoch)
    made: list[list[tuple[Tensor, Tensor]]] = []
    for client in range(CLIENTS):
        classes = torch.randint(0, 2, (4, 16), generator=drawn) + 2 * client
        made.append([(centres[c] + torch.randn(16, 12, generator=drawn), c) for c in classes])
    return made


def run_of(settings: Settings) -> AdaSplit:
    torch.manual_seed(0)
    edges = [(nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 8)) for _ in range(CLIENTS)]
    return AdaSplit(edges, nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), settings)


def right(run: AdaSplit) -> float:
    found = [(run.predict(i, x).argmax(1) == y) for i, each in enumerate(batches(99)) for x, y in each]
    return float(torch.cat(found).double().mean())


def test_it_learns_with_nothing_down_and_less_up():
    settings = Settings(epochs=15, local=0.6, heard=0.5, edge_rate=3e-3, server_rate=1e-2)
    run = run_of(settings)
    assert right(run) < 0.4
    said: list[int] = []
    run.fit(batches, lambda epoch: said.append(run.bytes["up"]))
    assert right(run) > 0.92
    assert run.bytes["down"] == 0
    assert said[8] == 0 < said[9]
    heard, features = 6 * 4 * 2, 16 * 16 * 4  # 6 epochs of 4 steps, 2 of 4 clients
    assert heard * features < run.bytes["up"] < heard * (features + 200)
    both_ways = 15 * 4 * CLIENTS * 2 * features
    assert run.bytes["up"] <= 0.45 * both_ways
    assert sum(run.chooser.visits) == heard


def test_an_edge_learns_the_same_whatever_the_server_is():
    """No gradient comes back, not even by the way: another server, another end, the same edges."""
    runs = run_of(Settings(epochs=2, local=0.0)), run_of(Settings(epochs=2, local=0.0))
    with torch.no_grad():
        for parameter in runs[1].server.model.parameters():
            parameter.mul_(-3.0)
    for run in runs:
        run.fit(batches)
    for ours, theirs in zip(*(run.edges for run in runs), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_masks_become_sparse_and_what_they_hide_stays():
    run = run_of(Settings(epochs=12, local=0.2, mask=1e-3, mask_rate=0.1, edge_rate=3e-3, server_rate=5e-3))
    run.fit(batches)
    assert right(run) > 0.9
    assert all(0.01 < run.server.seen(client) < 0.8 for client in range(CLIENTS))
    hidden = {name: mask == 0 for name, mask in run.server.masks[0].items()}
    before = copy.deepcopy(dict(run.server.model.named_parameters()))
    run.server.learn(0, torch.randn(16, 16), torch.zeros(16).long())
    after = dict(run.server.model.named_parameters())
    still = {name: mask == 0 for name, mask in run.server.masks[0].items()}
    moved = 0
    for name, old in before.items():
        kept = hidden[name] & still[name]
        assert torch.equal(after[name][kept], old[kept])
        moved += int((after[name] != old).sum())
    assert moved > 0


def test_a_mask_of_ones_is_the_plain_server():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    masked, x = Masked(model, 2, 1e-3, 1e-3, 0.0), torch.randn(5, 6)
    assert torch.equal(masked(1, x), model(x))


def test_the_contrastive_loss_is_its_formula():
    torch.manual_seed(0)
    z, classes, t = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2]), 0.3
    unit = z / z.norm(dim=1, keepdim=True)
    terms = []
    for i in range(6):
        alike = [j for j in range(6) if j != i and classes[j] == classes[i]]
        total = sum(math.exp(float(unit[i] @ unit[j]) / t) for j in range(6) if j != i)
        if alike:
            terms.append(-sum(math.log(math.exp(float(unit[i] @ unit[j]) / t) / total) for j in alike) / len(alike))
    assert contrastive(z, classes, t).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert contrastive(z[:1].requires_grad_(), classes[:1], t).item() == 0


def test_who_is_heard_next():
    """Everybody first; then the one that is worst, and in time the one that was not heard."""
    chooser = Chooser(3, decay=0.9)
    order = []
    for _ in range(3):
        (client,) = chooser.choose(1)
        order.append(client)
        chooser.heard({client: [0.1, 2.0, 0.1][client]})
    assert order == [0, 1, 2]
    for _ in range(60):
        (client,) = chooser.choose(1)
        chooser.heard({client: [0.1, 2.0, 0.1][client]})
    assert chooser.visits[1] > chooser.visits[0]
    assert min(chooser.visits) > 5
    with pytest.raises(ValueError, match="between 0 and 1"):
        Chooser(3, decay=1.0)
    with pytest.raises(ValueError, match="are shares"):
        Settings(local=1.5)


def test_the_score_can_be_reckoned_again_from_the_report(tmp_path: Path):
    spent = Spent(accuracy=0.9, wire_bytes=25e6, client_flops=3e9, most_bytes=100e6, most_flops=4e9)
    note(tmp_path / "run", 10, spent)
    (line,) = read_metrics(tmp_path / "run")
    assert line["c3_score"] == pytest.approx(0.9 * math.exp(-(0.25 + 0.75) / 8))
    again = Spent(**{k: v for k, v in json.loads(json.dumps(line)).items() if k in Spent.__dataclass_fields__})
    assert again.c3_score == line["c3_score"]
    assert summary([line])["C3-score"] == f"{spent.c3_score:.4f}"
    with pytest.raises(ValueError, match="budgets"):
        _ = Spent(0.9, 1.0, 1.0, 0.0, 1.0).c3_score
