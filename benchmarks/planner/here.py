"""Is a step on this machine what the planner says? Random models and layouts on up to four processes.

    python -m benchmarks.planner.here            profile, then every row that is missing, for at most --minutes
    python -m benchmarks.planner.here --again    forget what was measured before

In a round, for the rows of as many processes: the machine is profiled, as a user would (``profiled.py``), and the rows
are predicted with that and measured. A machine is slower in some minutes than in others, whatever else it does, hence a
profile just before; and of the rounds the fastest prediction and the fastest measurement count, each by itself. What
stands in ``here.json`` is kept; a job that fails is told, noted under its rows, and tried again in the next round.

Processes stand in for devices, but share the cores where there are fewer of these (``sharing.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.planner.profiled import PIPE, calibrated, company, constants, joined, lines, profile_of, shortened
from benchmarks.planner.random_rows import MODELS, ROWS, SEQ, Row, rows
from benchmarks.planner.sharing import makespan
from merak_like import Engine, Plan, auto_parallel
from merak_like.partitioner.explain.again import Again
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.this_machine import this_machine

OUT = Path(__file__).with_name("here.json")
ROUNDS, STEPS = 4, 5
TOGETHER, JOB = 12, 240.0
"""Rows that share a job, and the seconds it may take."""


def step_of(row: Row, hardware: Hardware) -> dict[str, Any]:
    """In a process of the row's job: what was predicted, and the fastest of a few steps."""
    engine, batch = built(row, hardware)
    found = {"predicted": predicted(engine.plan)}
    engine.step(batch)
    best = float("inf")
    for _ in range(STEPS):
        engine.barrier()
        begin = time.perf_counter()
        engine.step(batch)
        engine.barrier()
        best = min(best, time.perf_counter() - begin)
    engine.close()
    return found | {"measured": best}


def built(row: Row, hardware: Hardware) -> tuple[Engine, dict[str, torch.Tensor]]:
    """The row's engine and its batch."""
    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (row.dp * row.micro_batches * row.micro_batch, SEQ))
    batch = {"input_ids": ids, "labels": ids}
    engine = auto_parallel(
        MODELS[row.model](row.layers, row.width), row.dp, row.pp, row.tp, example=batch, schedule=row.schedule,
        micro_batches=row.micro_batches, hardware=hardware, recompute="none", device="cpu", timeout=60.0,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
    )  # fmt: skip
    return engine, batch


def predicted(plan: Plan) -> float:
    """Seconds of a plan's step where its ranks share the cores there are."""
    cores, judged, mesh = len(os.sched_getaffinity(0)), Again.of(plan).judged, plan.mesh
    pipeline = makespan(judged.schedule, judged.costs, judged.edges, alike=mesh.dp * mesh.tp, cores=cores)
    return pipeline + sum(plan.after.values()) * max(mesh.size / cores, 1)


def run(ranks: int, given: dict[str, Any], *, apart: bool = False) -> dict[str, Any]:
    """A job of this script: what its rank 0 answered before the job ended or, which is told too, failed.

    ``apart``: each process is a job of its own. The first answers, the others keep it company.
    """
    torchrun = [] if apart else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, "-m", "benchmarks.planner.here", "--task"]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(ranks if apart else 1)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for index, place in enumerate(places):
            place.mkdir()
            beside = {"company": [port, index, len(places)]} if apart else {}
            (place / "task.json").write_text(json.dumps(given | beside), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen([*command, str(place / "task.json")], env=environment) for place in places]
        failed, until = "", time.monotonic() + JOB
        for process in started:
            try:
                code = process.wait(max(until - time.monotonic(), 0.0))
                failed = failed or (f"a process ended with {code}" if code else "")
            except subprocess.TimeoutExpired:
                process.terminate()
                failed = f"it was not done after {JOB:.0f} s"
        said = places[0] / "answer.json"
        found = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
        return {"failed": failed or "it was left out"} | found


def answer(task: Path) -> None:
    """Be one process of a job."""
    torch.set_num_threads(1)
    asked, found = json.loads(task.read_text(encoding="utf-8")), dict[str, Any]()

    def say(name: str, told: Any) -> None:
        found[name] = told
        if int(os.environ.get("RANK", "0")) == 0:
            task.with_name("answer.json").write_text(json.dumps(found), encoding="utf-8")

    if asked.get("lines"):
        dist.init_process_group("gloo")
        say("lines", lines())
        dist.destroy_process_group()
    meet = company(*asked["company"]) if "company" in asked else lambda: None
    for one in asked.get("profiled", ()):
        row = Row(**one)
        say(row.name, profile_of(*built(row, Hardware.from_json(asked["hardware"])), meet))
    for one, text in asked.get("rows", ()):
        row = Row(**one)
        say(row.name, step_of(row, Hardware.from_json(text)))


def profile(held: dict[str, Any], asked: Sequence[Row]) -> dict[str, Hardware]:
    """This machine's hardware for each of some rows of as many ranks, calibrated by a profile of its own."""
    cores, save, ranks = len(os.sched_getaffinity(0)), partial(_save, held), asked[0].ranks
    if "rough" not in held:
        torch.set_num_threads(1)
        held["rough"] = json.loads(this_machine(device="cpu", again=True).to_json())
        save()
    known = held.setdefault("lines", {})
    for many in sorted({ranks, 2}):
        found = run(many, {"lines": True})
        if "lines" not in found:
            raise RuntimeError(f"messages between {many} processes were not measured: {found['failed']}")
        known[str(many)] = found["lines"]
        save()
    rough, profiles = Hardware.from_json(json.dumps(held["rough"])), dict[str, Any]()
    shorts = {row.name: row for one in asked for row in shortened(one)} | {PIPE.name: PIPE}
    for own in sorted({row.ranks for row in shorts.values()}):
        some = [row for row in shorts.values() if row.ranks == own]
        rough_lines = joined(rough, known, some[0], cores).to_json()
        given = {"profiled": list(map(asdict, some)), "hardware": rough_lines}
        found = run(max(ranks, cores), given, apart=True) if own == 1 else run(own, given)
        if any(row.name not in found for row in some):
            raise RuntimeError(f"the models were not profiled: {found['failed']}")
        profiles |= {row.name: found[row.name] for row in some}
    paced = fmean(one["pace"] for one in profiles.values())
    rows_of = {PIPE.name: (PIPE, [PIPE])} | {row.name: (row, shortened(row)) for row in asked}
    fitted = {
        name: calibrated(short, profiles, joined(rough, known, row, cores), cores, paced)
        for name, (row, short) in rows_of.items()
    }
    sending = fitted.pop(PIPE.name).message_seconds
    return {name: replace(hardware, message_seconds=sending) for name, hardware in fitted.items()}


def main() -> None:
    """Profile and measure in rounds until the minutes are over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the rows")
    parser.add_argument("--task", type=Path)
    args = parser.parse_args()
    if args.task is not None:
        answer(args.task)
        return
    until = time.monotonic() + 60 * args.minutes
    held: dict[str, Any] = {} if args.again or not OUT.exists() else json.loads(OUT.read_text(encoding="utf-8"))
    every = [row for i, row in enumerate(rows()) if args.only is None or i in args.only]
    held.setdefault("rows", {})
    for turn in range(ROUNDS):
        missing = [row for row in every if len(held["rows"].get(row.name, {}).get("rounds", ())) <= turn]
        for asked in _jobs(missing):
            hardware = profile(held, asked) if time.monotonic() < until else {}
            while asked and time.monotonic() < until:
                load = os.getloadavg()[0]
                given = [(asdict(row), hardware[row.name].to_json()) for row in asked]
                found = run(asked[0].ranks, {"rows": given})
                while asked and asked[0].name in found:
                    row = asked.pop(0)
                    own = held["rows"].setdefault(row.name, {"rounds": []})
                    _note(own, found[row.name] | {"constants": constants(hardware[row.name])}, row, load)
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
    """A round of a row: its profile's prediction and its fastest step."""
    known.pop("failed", None)
    known["rounds"].append(measured | {"load": round(load, 1)})
    for what in ("predicted", "measured"):
        known[what] = min(each[what] for each in known["rounds"])
    print(f"{row.name}: {measured['predicted']:.3f} s predicted, {measured['measured']:.3f} s measured", flush=True)


def _save(held: dict[str, Any]) -> None:
    held["setting"] = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    OUT.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
