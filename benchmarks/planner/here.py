"""Is a step on this machine what the planner says? Random models and layouts on up to four processes.

    python -m benchmarks.planner.here            profile, then every row that is missing, for at most --minutes
    python -m benchmarks.planner.here --again    forget what was measured before

The machine is profiled first, as a user would: ``this_machine``, links between two processes, and ``calibrate`` fed
with ``engine.profile()`` of every model on a replica per core: cores that are all busy share caches and memory, and so
they do in the rows. A row is predicted with that and measured in rounds that go over all rows, so that a busy minute
falls on all alike; the fastest round counts. What stands in ``here.json`` is kept; a job that fails is told, noted
under its rows, and tried again in the next round.

Processes stand in for devices, but share the cores where there are fewer of these: then no step ends before the cores
have done the work of all ranks, and the prediction is the later of this and the plan's step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merak_like import Plan, auto_parallel
from merak_like.partitioner.explain.calibration import calibrate
from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.recorded import Recorded
from merak_like.partitioner.this_machine import this_machine

OUT = Path(__file__).with_name("here.json")
ROWS, ROUNDS, STEPS = 20, 2, 5
TOGETHER, JOB = 4, 120.0
"""Rows that share a job, and the seconds it may take."""
SEED, SEQ = 2, 64
SIZES = (2**10, 2**16, 2**20, 2**22)
"""Bytes of the messages that links are measured with."""


def gpt2(layers: int, width: int) -> torch.nn.Module:
    """Learned positions, GELU, fused projections."""
    return GPT2LMHeadModel(GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, n_positions=SEQ, vocab_size=2048, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))  # fmt: skip


def llama(layers: int, width: int) -> torch.nn.Module:
    """Rotary positions, gated feed-forward, grouped queries."""
    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=3 * width, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, bos_token_id=0, eos_token_id=0, use_cache=False,
    ))  # fmt: skip


def bert(layers: int, width: int) -> torch.nn.Module:
    """Norms after the blocks, a head of its own."""
    return BertForMaskedLM(BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
        vocab_size=2048, max_position_embeddings=SEQ, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


MODELS: dict[str, Callable[[int, int], torch.nn.Module]] = {"gpt2": gpt2, "llama": llama, "bert": bert}
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v")


@dataclass(frozen=True)
class Row:
    """A model, its layout and its batch."""

    model: str
    layers: int
    width: int
    dp: int
    pp: int
    tp: int
    schedule: str
    micro_batches: int
    micro_batch: int

    @property
    def name(self) -> str:
        """For people, and the key in the file."""
        return (
            f"{self.model} {self.layers}x{self.width}, {self.dp}-{self.pp}-{self.tp}, {self.schedule}, "
            f"{self.micro_batches} x {self.micro_batch}"
        )

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.dp * self.pp * self.tp


def rows(count: int = ROWS, seed: int = SEED) -> list[Row]:
    """The same random rows everywhere; those beyond ``count`` would be others."""
    draw, found = random.Random(seed), dict[str, Row]()
    meshes = [(d, p, t) for d in (1, 2, 4) for p in (1, 2, 4) for t in (1, 2, 4) if 1 < d * p * t <= 4]
    while len(found) < count:
        dp, pp, tp = draw.choice(meshes)
        schedule = draw.choice(SCHEDULES) if pp > 1 else "1f1b"
        row = Row(
            draw.choice(sorted(MODELS)), draw.choice((4, 8)), draw.choice((128, 256, 384)), dp, pp, tp, schedule,
            pp * draw.choice((1, 2, 3)), draw.choice((1, 2, 4)),
        )  # fmt: skip
        found[row.name] = row
    return list(found.values())


def step_of(row: Row, hardware: Hardware, profiled: bool) -> dict[str, Any]:
    """In a process of the row's job: what was planned, and the fastest of a few steps."""
    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (row.dp * row.micro_batches * row.micro_batch, SEQ))
    batch = {"input_ids": ids, "labels": ids}
    engine = auto_parallel(
        MODELS[row.model](row.layers, row.width), row.dp, row.pp, row.tp, example=batch, schedule=row.schedule,
        micro_batches=row.micro_batches, hardware=hardware, recompute="none", device="cpu", timeout=60.0,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
    )  # fmt: skip
    engine.step(batch)
    best = float("inf")
    for _ in range(STEPS):
        engine.barrier()
        begin = time.perf_counter()
        engine.step(batch)
        engine.barrier()
        best = min(best, time.perf_counter() - begin)
    plan, found = engine.plan, dict[str, Any]()
    if profiled:
        with engine.profile() as profile:
            for _ in range(STEPS):
                engine.step(batch)
        if profile.recorded is not None:  # rank 0
            found = {"plan": json.loads(plan.to_json()), "profile": json.loads(profile.recorded.to_json())}
    engine.close()
    each = [s.forward_seconds + s.backward_seconds + s.recompute_seconds for s in plan.stages]
    return found | {
        "measured": best, "planned": plan.step_seconds, "pipeline": plan.pipeline_seconds,
        "busy": sum(each) * plan.micro_batches * plan.mesh.dp * plan.mesh.tp,
    }  # fmt: skip


def link() -> Link:
    """In a process of two: latency and bandwidth of messages there and back, least squares over their sizes."""
    times: list[float] = []
    for size in SIZES:
        message, spent = torch.zeros(size, dtype=torch.uint8), list[float]()
        for _ in range(12):
            dist.barrier()
            begin = time.perf_counter()
            for sender in (0, 1):
                (dist.send if dist.get_rank() == sender else dist.recv)(message, 1 - dist.get_rank())
            spent.append((time.perf_counter() - begin) / 2)
        times.append(median(spent))
    bandwidth = (SIZES[-1] - SIZES[1]) / max(times[-1] - times[1], 1e-9)
    return Link(bandwidth, max(times[0] - SIZES[0] / bandwidth, 1e-6))


def run(ranks: int, given: dict[str, Any]) -> dict[str, Any]:
    """A job of this script: what its rank 0 answered before the job ended or, which is told too, failed."""
    with tempfile.TemporaryDirectory() as folder:
        task, said = Path(folder) / "task.json", Path(folder) / "answer.json"
        task.write_text(json.dumps(given), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        failed = ""
        try:
            subprocess.run(
                [*command, "-m", "benchmarks.planner.here", "--task", str(task)], check=True, timeout=JOB,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.SubprocessError as error:
            failed = str(error)
        found = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
        return {"failed": failed or "it was left out"} | found


def answer(task: Path) -> None:
    """Be one process of a job."""
    torch.set_num_threads(1)
    asked, found = json.loads(task.read_text(encoding="utf-8")), dict[str, Any]()

    def say(name: str, told: Any) -> None:
        found[name] = told
        if int(os.environ["RANK"]) == 0:
            task.with_name("answer.json").write_text(json.dumps(found), encoding="utf-8")

    if asked.get("link"):
        dist.init_process_group("gloo")
        say("link", asdict(link()))
        dist.destroy_process_group()
    for one in asked.get("rows", ()):
        row = Row(**one)
        say(row.name, step_of(row, Hardware.from_json(asked["hardware"]), asked["profiled"]))


def profile(held: dict[str, Any]) -> Hardware:
    """This machine's hardware, calibrated. What is missing in ``held`` is run."""
    if "rough" not in held:
        torch.set_num_threads(1)
        found = run(2, {"link": True})
        if "link" not in found:
            raise RuntimeError(f"the link between two processes was not measured: {found['failed']}")
        between = Link(**found["link"])
        held["rough"] = json.loads(replace(this_machine(device="cpu", again=True), intra=between).to_json())
        _save(held)
    if "profiles" not in held:
        cores = len(os.sched_getaffinity(0))
        asked = [Row(model, 4, 256, cores, 1, 1, "1f1b", 2, 2) for model in sorted(MODELS)]
        given = {"rows": list(map(asdict, asked)), "hardware": json.dumps(held["rough"])}
        found = run(cores, given | {"profiled": True})
        if any(row.name not in found for row in asked):
            raise RuntimeError(f"the models were not profiled: {found['failed']}")
        held["profiles"] = {row.model: {k: found[row.name][k] for k in ("plan", "profile")} for row in asked}
        _save(held)
    made = calibrate([
        (Plan.from_json(json.dumps(one["plan"])), Recorded.from_json(json.dumps(one["profile"])))
        for one in held["profiles"].values()
    ])  # fmt: skip
    held["calibration"] = {
        "error before": made.error[0], "error after": made.error[1], "constants": dict(made.changed),
    }  # fmt: skip
    _save(held)
    print(f"stages of {len(MODELS)} models: mean error {made.error[0]:.1%}, calibrated {made.error[1]:.1%}", flush=True)
    return made.hardware


def predicted(measured: dict[str, Any], ranks: int) -> float:
    """The plan's step, or the work of all ranks over the cores if that takes longer."""
    cores = min(len(os.sched_getaffinity(0)), ranks)
    return max(measured["planned"], measured["busy"] / cores + measured["planned"] - measured["pipeline"])


def main() -> None:
    """Profile once, then measure in rounds until the minutes are over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--task", type=Path)
    args = parser.parse_args()
    if args.task is not None:
        answer(args.task)
        return
    until = time.monotonic() + 60 * args.minutes
    held: dict[str, Any] = {} if args.again or not OUT.exists() else json.loads(OUT.read_text(encoding="utf-8"))
    text = profile(held).to_json()
    held.setdefault("rows", {})
    for turn in range(ROUNDS):
        for asked in _jobs([row for row in rows() if len(held["rows"].get(row.name, {}).get("rounds", ())) <= turn]):
            while asked and time.monotonic() < until:
                load = os.getloadavg()[0]
                found = run(asked[0].ranks, {"rows": list(map(asdict, asked)), "hardware": text, "profiled": False})
                while asked and asked[0].name in found:
                    row = asked.pop(0)
                    _note(held["rows"].setdefault(row.name, {"rounds": []}), found[row.name], row, load)
                if asked:
                    row = asked.pop(0)
                    held["rows"].setdefault(row.name, {"rounds": []})["failed"] = found["failed"]
                    print(f"{row.name}: {found['failed']}", flush=True)
                _save(held)
    errors = [abs(r["predicted"] / r["measured"] - 1) for r in held["rows"].values() if r["rounds"]]
    if errors:
        print(f"{len(errors)} of {ROWS} rows: mean error {fmean(errors):.1%}, worst {max(errors):.1%}")


def _jobs(asked: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of as many processes share a job: starting one takes longer than its steps."""
    for ranks in sorted({row.ranks for row in asked}):
        own = [row for row in asked if row.ranks == ranks]
        for first in range(0, len(own), TOGETHER):
            yield own[first : first + TOGETHER]


def _note(known: dict[str, Any], measured: dict[str, Any], row: Row, load: float) -> None:
    """A round of a row: its fastest step."""
    known.pop("failed", None)
    known["rounds"].append({"seconds": measured["measured"], "load": round(load, 1)})
    known["predicted"] = predicted(measured, row.ranks)
    known["measured"] = min(each["seconds"] for each in known["rounds"])
    print(f"{row.name}: {known['predicted']:.3f} s predicted, {known['measured']:.3f} s measured", flush=True)


def _save(held: dict[str, Any]) -> None:
    held["setting"] = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    OUT.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
