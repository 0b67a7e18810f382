"""Rows about edges and their hosts: training without a downlink, text through hosts of blocks."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

from small import SEEDS, Lines, digits, mean

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
"""The digits that each client has."""
UPLINK = 100e6
"""Bits a second of the link that weights would be sent over; stated with the number."""


def adasplit(epochs: int = 15) -> Lines:
    """Five clients with two digits each: AdaSplit beside plain split training, the same sizes, steps and codec."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from merak_like.runtime.codecs import Context, codec
    from merak_like.split.adasplit import AdaSplit, Settings
    from merak_like.split.score import Spent

    x, y = digits()

    def parts(first: int, stop: int) -> list[tuple[Any, Any]]:
        masks = [torch.isin(y[first:stop], torch.tensor(pair)) for pair in PAIRS]
        return [(x[first:stop][mask], y[first:stop][mask]) for mask in masks]

    train, held = parts(0, 1437), parts(1437, 1797)

    def batches(seed: int, epoch: int) -> list[list[tuple[Any, Any]]]:
        drawn = torch.Generator().manual_seed(1000 * seed + epoch)
        return [[(a[i], b[i]) for i in torch.randperm(len(b), generator=drawn).split(32)] for a, b in train]

    def edge() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU())

    def server() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def without(seed: int) -> tuple[float, Counter[str], int, float]:
        torch.manual_seed(seed)
        run = AdaSplit([(edge(), nn.Linear(64, 32)) for _ in PAIRS], server(), Settings(epochs=epochs))
        run.fit(lambda epoch: batches(seed, epoch))
        right = [float((run.predict(i, a).argmax(1) == b).double().mean()) for i, (a, b) in enumerate(held)]
        seen = sum(run.server.seen(i) for i in range(len(PAIRS))) / len(PAIRS)
        return sum(right) / len(right), run.bytes, run.edge_flops, seen

    def plain(seed: int) -> tuple[float, Counter[str], int]:
        torch.manual_seed(seed)
        edges, host = [edge() for _ in PAIRS], server()
        learners = [torch.optim.Adam(model.parameters(), 1e-3) for model in (*edges, host)]
        sent, flops = Counter[str](), 0
        for epoch in range(epochs):
            turns = batches(seed, epoch)
            for step in range(max(map(len, turns))):
                for client, (samples, classes) in ((i, t[step]) for i, t in enumerate(turns) if step < len(t)):
                    with FlopCounterMode(display=False) as counter:
                        z = edges[client](samples)
                        frame = codec("identity").encode(z.detach(), Context(step=step))
                        arrived = codec("identity").decode(frame, Context(step=step)).requires_grad_()
                        sent["up"] += frame.numel()
                        told = codec("identity").encode(classes.to(torch.int16), Context(step=step))
                        sent["up"] += told.numel()
                    own = counter.get_total_flops()
                    F.cross_entropy(host(arrived), classes).backward()
                    back = codec("identity").encode(arrived.grad, Context(step=step, direction="backward"))  # type: ignore[arg-type]
                    sent["down"] += back.numel()
                    with FlopCounterMode(display=False) as counter:
                        z.backward(arrived.grad)
                    flops += own + counter.get_total_flops()
                    for learner in (learners[client], learners[-1]):
                        learner.step()
                        learner.zero_grad()
        right = [float((host(edges[i](a)).argmax(1) == b).double().mean()) for i, (a, b) in enumerate(held)]
        return sum(right) / len(right), sent, flops

    ours, theirs = [without(seed) for seed in range(SEEDS)], [plain(seed) for seed in range(SEEDS)]
    scores = [mean(run[0] for run in runs) for runs in (ours, theirs)]
    budget = float(sum(theirs[0][1].values())), float(max(ours[0][2], theirs[0][2]))
    c3 = [
        Spent(score, sum(runs[0][1].values()), runs[0][2], *budget).c3_score
        for score, runs in zip(scores, (ours, theirs), strict=True)
    ]
    where = f"digits, 5 clients with 2 each, {epochs} epochs, {SEEDS} seeds"
    return [
        [where, "bytes down", "0", f"{ours[0][1]['down']:,}"],
        [where, "bytes to plain split's, both ways", "0.45", f"{sum(ours[0][1].values()) / budget[0]:.2f}"],
        [where, "accuracy on own digits: AdaSplit, plain split", "-0.02", f"{scores[0]:.3f} {scores[1]:.3f}"],
        [where, "operations of the edges to plain split's", "", f"{ours[0][2] / theirs[0][2]:.2f}"],
        [where, "share of the server's weights that a client sees", "", f"{mean(run[3] for run in ours):.2f}"],
        [where, "C3-score at temperature 8: AdaSplit, plain split", "", " ".join(f"{s:.3f}" for s in c3)],
    ]


def generate(tokens: int = 48) -> Lines:
    """Text of a small GPT-2: all here with a cache, through two hosts on loopback, and if weights were sent."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from merak_like.split.blocks.generator import Generator
    from merak_like.split.blocks.serving import BlockHost
    from merak_like.split.half import Source

    torch.manual_seed(0)
    config = GPT2Config(n_layer=8, n_embd=512, n_head=8, vocab_size=5000, bos_token_id=0, eos_token_id=0)
    model: Any = GPT2LMHeadModel(config).eval()
    source, prompt = Source(lambda: copy.deepcopy(model)), [list(range(5, 37))]
    blocks = sum(p.nbytes for p in model.transformer.h.parameters())

    def timed(made: Generator) -> tuple[float, list[int], Counter[str], float]:
        made.generate(prompt, max_new_tokens=tokens)  # traces
        made.bytes.clear()
        rates, said, busy = [], [], time.process_time()
        for _ in range(3):
            began = time.perf_counter()
            said = made.generate(prompt, max_new_tokens=tokens)[0]
            rates.append(tokens / (time.perf_counter() - began))
        return sorted(rates)[1], said, made.bytes, (time.process_time() - busy) / 3 / tokens

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        hosts = [
            stack.enter_context(BlockHost(source, a, b, listen="127.0.0.1:0", folder=f"{folder}/{a}"))
            for a, b in ((0, 4), (4, 8))
        ]
        here, there = (
            stack.enter_context(Generator(source, connect=connect))
            for connect in ([], [f"127.0.0.1:{host.port}" for host in hosts])
        )
        (fast, said, _, least), (remote, also, sent, busy) = timed(here), timed(there)
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    each = sum(sent.values()) / 3 / (tokens + len(prompt[0]) - 1)
    where = f"GPT-2, 8 blocks of 512, {tokens} tokens, 2 hosts, one process"
    equal, over = f"{said == theirs[0].tolist()} {also == said}", f"{UPLINK / 1e6:.0f} Mbit/s"
    return [
        [where, "tokens equal to transformers': here, through hosts", "all", equal],
        [where, "tokens a second: here, through hosts", "", f"{fast:.1f} {remote:.1f}"],
        [where, "CPU milliseconds of a token: here, client and hosts together", "",
         f"{1e3 * least:.1f} {1e3 * busy:.1f}"],
        [where, "bytes of a token, both ways, both hosts", "", f"{each:,.0f}"],
        [where, f"tokens a second if each needs the blocks' {blocks / 1e6:.0f} MB over {over} (reckoned)",
         "", f"{UPLINK / 8 / blocks:.2f}"],
        [where, f"tokens a second of those {each / 1e3:.0f} kB over the same link (reckoned, no latency)",
         "", f"{1 / (1 / remote + 8 * each / UPLINK):.1f}"],
    ]  # fmt: skip
