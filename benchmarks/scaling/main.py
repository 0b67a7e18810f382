"""How do trace, plan, simulate and validate grow with the model, and the search with the machine? See README.md.

    python benchmarks/scaling/main.py

CPU seconds of one process. Writes results.json and scaling.png.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import json
import math
import platform
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
DEVICES = (64, 256, 1024, 4096, 16384)


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
    """Every degree chosen for Llama 3.1 70B on so many devices, 2 samples of 4,096 tokens for each."""
    import tempfile

    from merak_like.hf import from_config
    from merak_like.partitioner.degrees import choose
    from merak_like.partitioner.hardware import hardware_named
    from merak_like.partitioner.layouts import Wanted
    from merak_like.partitioner.one_rank import Sources
    from merak_like.partitioner.software import Software
    from merak_like.partitioner.states import STATES

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, "hidden_size": 8192,
        "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
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

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), constrained_layout=True)
    for axis, (kind, lines) in zip(axes, found.items(), strict=True):
        for name, points in lines.items():
            axis.loglog(*zip(*sorted(points.items()), strict=True), "o-", label=f"{name}, slope {slope(points):.2f}")
        axis.set_xlabel(kind)
        axis.set_ylabel("CPU seconds")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Each size in a process of its own, so that none finds the caches of another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", nargs="*", help="a kind and a size: only this, in this process")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one size; larger ones are left out")
    args = parser.parse_args()
    if args.one:
        kind, size = args.one
        print(json.dumps(KINDS[kind][0](int(size))))
        return
    here = Path(__file__).parent
    path = here / "results.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows: dict[str, dict[str, dict[str, float]]] = {kind: before.get(kind, {}) for kind in KINDS}
    for kind in args.only:
        rows[kind] = {}
        for size in KINDS[kind][1]:
            try:
                run = subprocess.run(
                    [sys.executable, __file__, kind, str(size)], check=True, capture_output=True, text=True,
                    timeout=args.timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                print(f"{size} {kind}: more than {args.timeout:.0f} s")
                break
            rows[kind][str(size)] = {name: round(s, 4) for name, s in json.loads(run.stdout.splitlines()[-1]).items()}
            print(f"{size} {kind}: {rows[kind][str(size)]}", flush=True)
    lines = {
        kind: {name: {int(size): row[name] for size, row in sizes.items()} for name in next(iter(sizes.values()))}
        for kind, sizes in rows.items()
        if sizes
    }
    setting = {
        "torch": torch.__version__, "Python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    slopes = {kind: {name: round(slope(points), 2) for name, points in of.items()} for kind, of in lines.items()}
    path.write_text(json.dumps({"setting": setting, "rows": rows, "slopes": slopes}, indent=1) + "\n")
    chart(lines, here / "scaling.png")


if __name__ == "__main__":
    main()
