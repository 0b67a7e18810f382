"""One process of the job: every layout of 8 ranks, measured and predicted, one after the other."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pace import PACED, Pace
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Engine, Plan, auto_parallel, trace
from merak_like.partitioner.assemble import assemble
from merak_like.partitioner.judge import Judge
from merak_like.partitioner.notes import equal_blocks
from merak_like.partitioner.planner import ask

LAYERS, HIDDEN, HEADS, TOKENS, VOCABULARY, SAMPLES, EACH = 8, 256, 8, 128, 8192, 16, 2
STEPS = 3


@dataclass(frozen=True)
class Way:
    """Degrees and a schedule, or the rules of Merak: equal blocks, 1F1B, everything computed again."""

    dp: int
    pp: int
    tp: int
    schedule: str
    rules: bool = False

    @property
    def name(self) -> str:
        return "merak's rules" if self.rules else self.schedule


def ways() -> Iterator[Way]:
    """Every factorisation of 8 with the schedules that its pipeline can have."""
    for pp in (1, 2, 4, 8):
        for tp in (t for t in (1, 2, 4, 8) if 8 % (pp * t) == 0):
            dp = 8 // pp // tp
            schedules = {1: ("1f1b",), 8: ("1f1b", "zb-h1", "auto")}.get(pp, ("1f1b", "interleaved", "zb-h1", "auto"))
            for schedule in schedules:
                yield Way(dp, pp, tp, schedule)
            yield Way(dp, pp, tp, "1f1b", rules=True)


def model() -> GPT2LMHeadModel:
    """GPT-2 whose head is as dear as five of its eight blocks' halves: equal blocks are not equal work."""
    torch.manual_seed(0)
    more: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "eager"}
    config = GPT2Config(
        n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, n_positions=TOKENS, vocab_size=VOCABULARY, use_cache=False,
        bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def batch(samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    """Random tokens."""
    ids = torch.randint(0, VOCABULARY, (samples, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def by_rules(way: Way, made: Plan) -> Plan:
    """The same plan with the same number of blocks on each stage."""
    graph = trace(model(), batch(EACH)).graph
    asked = ask(graph, made.mesh, hardware=PACED, batch=SAMPLES, schedule=way.schedule, recompute="full")
    setting = asked.setting(made.micro_batches)
    starts = equal_blocks(graph, setting)
    judged = Judge(setting.problem)(starts)
    assert judged is not None
    return assemble(
        graph, setting, starts, judged, micro_batch=EACH, signature=made.signature, sharding=made.sharding, notes=()
    )  # fmt: skip


def built(way: Way, plan: Plan | None = None) -> Engine:
    """The engine of a way."""
    return auto_parallel(
        model(), way.dp, way.pp, way.tp, example=batch(), micro_batches=SAMPLES // EACH // way.dp,
        schedule=way.schedule, recompute="full" if way.rules else "auto", hardware=PACED, device="cpu", plan=plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
    )  # fmt: skip


def measured(engine: Engine) -> float:
    """Median seconds of a step, from all ranks ready to all ranks done."""
    seconds: list[float] = []
    for _ in range(STEPS + 1):
        dist.barrier()
        begin = time.perf_counter()
        with Pace():
            engine.step(batch())
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main() -> None:
    """Write a row for each way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows: list[dict[str, Any]] = []
    only = sys.argv[2:]
    for way in ways():
        if only and f"{way.dp},{way.pp},{way.tp}" not in only:
            continue
        engine = built(way)
        if way.rules and way.pp > 1 and way.tp == 1:
            plan = by_rules(way, engine.plan)
            engine.close()
            engine = built(way, plan)
        row = {
            "dp": way.dp, "pp": way.pp, "tp": way.tp, "name": way.name, "predicted": engine.plan.step_seconds,
            "measured": measured(engine),
        }  # fmt: skip
        engine.close()
        if dist.get_rank() == 0:
            rows.append(row)
            print(json.dumps(row), flush=True)
            Path(sys.argv[1]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
