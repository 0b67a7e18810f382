"""Published measurements as questions to the planner: one model, one layout, one answer in seconds."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from merak_like.partitioner.hardware import Hardware, Link, hardware_named
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import STATES

DATA = Path(__file__).parent / "data"
VTRAIN = {"inter": Link(12.5e9, 10e-6), "devices_per_adapter": 2}
"""vTrain's cluster: 800 Gb/s for each node of 8 A100, taken to be four adapters of 200 Gb/s."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    table: str
    name: str
    seconds: float
    model: tuple[int, int, int, int, int]
    """Hidden size, layers, heads, vocabulary, tokens."""
    mesh: Mesh
    micro_batch: int
    batch: int
    recompute: str
    hardware: str
    chunks: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    states: str = "adamw-megatron"
    cluster: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What of the hardware is not the preset's."""

    def plan(self, hardware: Hardware | None = None) -> Plan:
        """What the planner makes of it."""
        hardware = replace(hardware or hardware_named(self.hardware), **self.cluster)
        made = sources(*self.model)
        selective = self.recompute == "selective"
        return make_plan(
            made.graph, self.mesh, hardware=hardware, batch=self.batch, micro_batch=self.micro_batch,
            schedule="interleaved" if self.chunks > 1 else "1f1b", chunks=self.chunks if self.chunks > 1 else None,
            recompute="none" if selective else self.recompute, states=STATES[self.states], zero=self.zero,
            sequence_parallel=self.sequence_parallel, sources=made, memory_limit=10**13, thorough=False,
            software=Software("fused", hardware.attention, selective and hardware.attention == "math"),
        )  # fmt: skip


@cache
def sources(hidden: int, layers: int, heads: int, vocabulary: int, tokens: int) -> Sources:
    """A GPT of that shape, traced."""
    from merak_like.hf import from_config

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(gpt(hidden, layers, heads, vocabulary, tokens))
        made = from_config(folder, batch=1, seq=tokens, dtype="bfloat16")
    return Sources.of(*made)


def gpt(hidden: int, layers: int, heads: int, vocabulary: int, tokens: int) -> str:
    """A ``config.json``."""
    import json

    return json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": hidden, "n_layer": layers,
        "n_head": heads, "vocab_size": vocabulary, "n_positions": tokens, "bos_token_id": 0, "eos_token_id": 0,
    })  # fmt: skip


def read(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, numbers as numbers."""
    with (DATA / name).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {key: _number(text) for key, text in row.items()}


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value == int(value) and "." not in text else value


def sc21() -> Iterator[Row]:
    """Narayanan et al. 2021, Table 1."""
    for r in read("megatron_sc21_table1.csv"):
        per = r["layers_per_virtual"]
        chunks = 1 if per == "-" else round(r["L"] / r["PP"] / per)
        mesh = Mesh(r["DP"], r["PP"], r["TP"])
        yield Row(
            "SC'21", f"{r['params_B']}B", r["iter_s_derived"], (r["h"], r["L"], r["heads"], 51200, 2048), mesh,
            r["mbs"], r["GBS"], "blocks", "a100-80gb", chunks,
        )  # fmt: skip


def korthikanti() -> Iterator[Row]:
    """Korthikanti et al. 2022, Table 5."""
    for r in read("korthikanti_time.csv"):
        mesh = Mesh(r["GPUs"] // r["TP"] // r["PP"], r["PP"], r["TP"])
        model = (r["h"], r["L"], r["heads"], 51200, 2048)
        for kind, recompute, parallel in (("full", "blocks", False), ("seqsel", "selective", True)):
            yield Row(
                "Korthikanti", f"{r['model']} {kind}", r[f"t_{kind}_s"], model, mesh, r["mbs"], r["GBS"], recompute,
                "a100-80gb", r["interleave_v"], parallel,
            )  # fmt: skip


def h100() -> Iterator[Row]:
    """Megatron-LM's README; the seconds follow from its TFLOP/s and the FLOPs of the paper above."""
    for r in read("megatron_core_h100.csv"):
        h, layers, vocabulary, tokens = r["h"], r["L"], 131072, 4096
        flops = 72 * r["GBS"] * tokens * layers * h**2 * (1 + tokens / (6 * h) + vocabulary / (12 * layers * h))
        chunks = {1: 1, 2: 7 if layers == 84 else 4}.get(r["PP"], 2)
        yield Row(
            "H100", str(r["params"]), flops / r["GPUs"] / r["TFLOPs_per_GPU"] / 1e12,
            (h, layers, r["heads"], vocabulary, tokens), Mesh(r["DP"], r["PP"], r["TP"]), 1, r["GBS"], "none", "h100",
            chunks, r["TP"] > 1, 1,
        )  # fmt: skip


def zero_bubble() -> Iterator[Row]:
    """Qi et al. 2024, Table 4: 1F1B. Their profiles count two layers fewer than the models have."""
    for r in read("zero_bubble_iclr24.csv"):
        ranks, samples = r["p=GPUs"], r["mbs"] * r["m"]
        yield Row(
            "Zero Bubble", f"{r['model']} m={r['m']}", samples / ranks / r["thr_1f1b"],
            (r["h"], r["L"] + 2, r["heads"], 51200, 1024), Mesh(1, ranks, 1), r["mbs"], samples, "none", "a100-80gb",
        )  # fmt: skip


def vtrain() -> Iterator[Row]:
    """Bang et al. 2024 (vTrain), ground truth. Gradients have two bytes, as in the authors' simulator of these steps;
    with four, 3.6B parameters and their states would not fit one A100, as they did."""
    for r in read("vtrain_multi_node.csv"):
        mesh = Mesh(r["dp"], r["pp"], r["tp"])
        yield Row(
            "vTrain", f"{r['params_B']}B {r['tp']}-{r['dp']}-{r['pp']} mbs {r['microbatch']}", r["iteration_ms"] / 1e3,
            (r["hidden"], r["layers"], r["heads"], 51200, 2048), mesh, r["microbatch"], r["global_batch"], "blocks",
            "a100-80gb", states="adamw-mixed", cluster=VTRAIN,
        )  # fmt: skip
