"""One process of the job: layouts of 8 ranks, measured and predicted, one after the other."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pace import PACED, SLOW, Pace
from transformers import GPT2Config, GPT2LMHeadModel
from ways import Way, measured_well, ways

from merak_like import Engine, Plan, auto_parallel, trace
from merak_like.partitioner.assemble import assemble
from merak_like.partitioner.judge import Judge
from merak_like.partitioner.notes import equal_blocks
from merak_like.partitioner.planner import ask

LAYERS, HIDDEN, HEADS, TOKENS, VOCABULARY, SAMPLES, EACH = 8, 256, 8, 128, 8192, 16, 2
LEAST, MOST, SPREAD = 2, 6, 0.02
"""Steps of a way: until the two fastest differ by no more than that."""


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
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    )  # fmt: skip


@dataclass(frozen=True, order=True)
class Step:
    """Seconds from all ranks ready to all ranks done, and CPU seconds of all ranks and of the machine in it."""

    seconds: float
    own: float
    machine: float


def measured(engine: Engine) -> dict[str, float]:
    """Seconds of the fastest step, for others on the machine only add; shares of all cores that ranks and others took.

    With ``load`` near 1 the ranks wait for cores and not for the pace.
    """
    pace, steps, cores = Pace(), list[Step](), os.cpu_count() or 1
    timed(engine, pace)
    while len(steps) < LEAST or (len(steps) < MOST and steps[1].seconds > (1 + SPREAD) * steps[0].seconds):
        steps = sorted([*steps, timed(engine, pace)])
    best = steps[0]
    return {
        "measured": best.seconds / SLOW, "load": round(best.own / best.seconds / cores, 3),
        "others": round(max(0.0, best.machine - best.own) / best.seconds / cores, 3), "steps": len(steps),
    }  # fmt: skip


def timed(engine: Engine, pace: Pace) -> Step:
    """A step, as every rank sees it."""
    dist.barrier()
    begin, own, machine = time.perf_counter(), time.process_time(), busy()
    with pace:
        engine.step(batch())
    own = time.process_time() - own
    dist.barrier()
    found = torch.tensor([time.perf_counter() - begin, 0.0, busy() - machine], dtype=torch.float64)
    dist.broadcast(found, 0)
    found[1] = own
    dist.all_reduce(found[1:2])
    return Step(*found.tolist())


def busy() -> float:
    """CPU seconds of all processes of the machine so far."""
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Append a row for each way that is not there yet, while the time lasts."""
    out, minutes, only = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    begin = time.monotonic()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    known = measured_well(out)
    for way in ways():
        if (way.dp, way.pp, way.tp, way.name) in known or (only and f"{way.dp},{way.pp},{way.tp}" not in only):
            continue
        late = torch.tensor(time.monotonic() - begin > 60 * minutes)
        dist.broadcast(late, 0)
        if late:
            break
        engine = built(way)
        if way.rules and way.pp > 1 and way.tp == 1:
            plan = by_rules(way, engine.plan)
            engine.close()
            engine = built(way, plan)
        row = {**_degrees(way), "predicted": engine.plan.step_seconds, **measured(engine)}
        engine.close()
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def _degrees(way: Way) -> dict[str, Any]:
    return {"dp": way.dp, "pp": way.pp, "tp": way.tp, "name": way.name}


if __name__ == "__main__":
    main()
