"""How do trace, plan, simulate and validate grow with the model, and the search with the machine? See README.md.

    python benchmarks/scaling/main.py                 what results.json lacks; --again: everything

CPU seconds of one process, so that a machine in use serves as well. Writes results.json, size by size, and scaling.png.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import json
import math
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

LAYERS = (10, 20, 50, 100, 200, 500, 1000, 2000)
STAGES = 8
MICRO_BATCHES = 64
PIPES = (8, 16, 32, 64, 128, 256)
DEVICES = (8, 64, 256, 1024, 4096, 16384)


def seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what was made."""
    begin = time.process_time()
    made = act()
    return time.process_time() - begin, made


def gpt(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 as deep as that, as wide as its smallest, on the meta device; and one sample."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False)).train()
    ids = torch.zeros((1, 1024), dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def of_layers(layers: int) -> dict[str, float]:
    """A model of so many layers on 8 stages."""
    from merak_like import Mesh, make_plan, trace

    model, batch = gpt(layers)
    trace(gpt(2)[0], batch)  # imports and first calls
    found = dict[str, float]()
    found["trace"], traced = seconds(lambda: trace(model, batch))

    def plan() -> Any:
        return make_plan(
            traced.graph, Mesh(pp=STAGES), hardware="a100-80gb", batch=MICRO_BATCHES, micro_batches=MICRO_BATCHES,
            schedule="1f1b", memory_limit=10**15,
        )  # fmt: skip

    found["plan"], _ = seconds(plan)
    return found


def of_stages(stages: int) -> dict[str, float]:
    """A pipeline of so many ranks with 4 micro-batches for each."""
    from merak_like.partitioner.schedules import data_builder
    from merak_like.partitioner.schedules.passes import add_transfers
    from merak_like.partitioner.schedules.validate import validate
    from merak_like.partitioner.simulator import Costs, StageCosts, simulate

    edges = frozenset((s, s + 1) for s in range(stages - 1))
    costs = Costs(tuple(StageCosts(1.0, 2.0, 0.0, 0.0) for _ in range(stages)))
    found = dict[str, float]()
    found["build"], schedule = seconds(lambda: add_transfers(data_builder("1f1b")(stages, 4 * stages), edges))
    found["validate"], _ = seconds(lambda: validate(schedule, edges))
    found["simulate"], _ = seconds(lambda: simulate(schedule, costs, edges))
    return found


def of_devices(devices: int) -> dict[str, float]:
    """Every degree chosen for Llama 3.1 8B on so many devices, 2 samples of 4,096 tokens for each."""
    import tempfile

    from merak_like.hf import from_config
    from merak_like.partitioner.degrees import choose
    from merak_like.partitioner.hardware import hardware_named
    from merak_like.partitioner.layouts import Wanted
    from merak_like.partitioner.one_rank import Sources
    from merak_like.partitioner.software import Software
    from merak_like.partitioner.states import STATES

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        made = from_config(folder, batch=1, seq=4096, dtype="bfloat16")
    given = Sources.of(*made)
    wanted = Wanted(devices, 2 * devices)
    spent, _ = seconds(
        lambda: choose(
            given, wanted, hardware_named("h100"), Software("fused", "flash"), states=STATES["adamw-megatron"]
        )
    )
    return {"search": spent}


KINDS: dict[str, tuple[Callable[[int], dict[str, float]], Sequence[int]]] = {
    "layers": (of_layers, LAYERS), "stages": (of_stages, PIPES), "devices": (of_devices, DEVICES),
}  # fmt: skip


def slope(points: dict[int, float]) -> float:
    """Of log seconds over log size, by least squares over the larger half of the sizes, where small costs are past."""
    sizes = sorted(points)[len(points) // 2 - 1 :]
    x, y = [math.log(s) for s in sizes], [math.log(max(points[s], 1e-6)) for s in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def chart(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Each kind in a panel, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), squeeze=False, figsize=(4.2 * len(found), 3.6), constrained_layout=True
    )
    for axis, (kind, lines) in zip(axes[0], found.items(), strict=True):
        for name, points in lines.items():
            axis.loglog(*zip(*sorted(points.items()), strict=True), "o-", label=f"{name}, slope {slope(points):.2f}")
        axis.set_xlabel(kind)
        axis.set_ylabel("CPU seconds")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measured(kind: str, size: int, limit: int) -> dict[str, float] | None:
    """A size in a process of its own, so that it finds no other's caches; None where it needs more CPU than that."""
    run = subprocess.run(
        [sys.executable, __file__, "--one", kind, str(size)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )  # fmt: skip
    if run.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        print(f"{size} {kind}: more than {limit} s")
        return None
    if run.returncode:
        raise SystemExit(f"{size} {kind}: {run.stderr.strip()}")
    return {name: round(s, 4) for name, s in json.loads(run.stdout.splitlines()[-1]).items()}


def main() -> None:
    """Every size that is not known yet, as far as the time goes; then slopes and chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help="only print this, measured in this process")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds of a size; larger ones are left out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no size after that")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(KINDS[args.one[0]][0](int(args.one[1]))))
        return
    here, begun = Path(__file__).parent, time.monotonic()
    path = here / "results.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows: dict[str, dict[str, dict[str, float]]] = {kind: known.get(kind, {}) for kind in KINDS}
    if args.again:
        rows |= {kind: {} for kind in args.only}
    for kind, size in ((name, size) for name in args.only for size in KINDS[name][1]):
        if str(size) in rows[kind] or time.monotonic() - begun > 60 * args.minutes:
            continue
        if (row := measured(kind, size, args.limit)) is not None:
            rows[kind][str(size)] = row
            print(f"{size} {kind}: {row}", flush=True)
            write(rows, here)


def write(rows: dict[str, dict[str, dict[str, float]]], here: Path) -> None:
    """What is known so far, its slopes and its chart."""
    lines = {
        kind: {name: {int(size): row[name] for size, row in sizes.items()} for name in next(iter(sizes.values()))}
        for kind, sizes in rows.items()
        if len(sizes) > 1
    }
    setting = {
        "torch": torch.__version__, "Python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }  # fmt: skip
    slopes = {kind: {name: round(slope(points), 2) for name, points in of.items()} for kind, of in lines.items()}
    text = json.dumps({"setting": setting, "rows": rows, "slopes": slopes}, indent=1)
    (here / "results.json").write_text(text + "\n")
    if lines:
        chart(lines, here / "scaling.png")


if __name__ == "__main__":
    main()
