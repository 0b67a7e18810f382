"""Step time over 2 tensor-parallel ranks: plainly, and with micro-batches in shares. One process of a job."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Engine, auto_parallel
from merak_like.runtime.tensor_parallel import collectives

LAYERS, HIDDEN, SEQ, SAMPLES, ROUNDS = 6, 384, 128, 8, 9
CONTENDERS = {"plain": 1, "2 shares": 2, "4 shares": 4}


def model() -> GPT2LMHeadModel:
    """A small GPT-2, without dropout."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=HIDDEN, n_head=6, n_positions=SEQ, vocab_size=1000, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def reduced_bytes(engine: Engine) -> int:
    """Payload of all sums of a step, forward and backward: what each of two ranks sends."""
    total = 0
    before = collectives.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        total += tensor.nbytes
        return before(tensor, *args, **kwargs)

    with mock.patch.object(collectives, "all_reduce", counted):
        engine.step(batch())
    return total


def batch() -> dict[str, torch.Tensor]:
    """Random tokens, always the same."""
    ids = torch.randint(0, 1000, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Alternate the contenders; medians of the slower rank."""
    engines = {
        name: auto_parallel(
            model(), 1, 1, 2, example=batch(), micro_batches=1, tp_shares=shares, device="cpu",
            optimizer=torch.optim.AdamW, hardware="a100-80gb",
        )
        for name, shares in CONTENDERS.items()
    }  # fmt: skip
    losses = {name: [engine.step(batch()).loss for _ in range(2)] for name, engine in engines.items()}
    assert all(abs(a - b) < 1e-4 for own in losses.values() for a, b in zip(own, losses["plain"], strict=True)), losses
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(ROUNDS):
        for name in sorted(engines, key=lambda n: (list(engines).index(n) + turn) % len(engines)):
            dist.barrier()
            begin = time.perf_counter()
            engines[name].step(batch())
            times[name].append(time.perf_counter() - begin)
    found = torch.tensor([statistics.median(own) for own in times.values()], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    sent = reduced_bytes(engines["plain"])
    if dist.get_rank() == 0:
        rows = {name: {"milliseconds": round(s * 1e3, 1)} for name, s in zip(engines, found.tolist(), strict=True)}
        setting = {"layers": LAYERS, "hidden": HIDDEN, "sequence": SEQ, "samples": SAMPLES, "rounds": ROUNDS}
        Path(sys.argv[1]).write_text(json.dumps({"setting": setting, "bytes a step": sent, "rows": rows}))
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
