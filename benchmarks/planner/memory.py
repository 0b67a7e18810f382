"""Korthikanti et al. 2022: what a rank holds, for models of which only the transformer layers count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.planner.rows import Row, read
from merak_like.partitioner.mesh import Mesh

GIB = 2**30
SHAPES = {
    "22B": ((6144, 48, 64, 51200, 2048), Mesh(1, 1, 8), 4, 4, 1),
    "175B": ((12288, 96, 96, 51200, 2048), Mesh(1, 8, 8), 1, 64, 3),
}
WAYS = {
    "none": ("none", False), "seq": ("none", True), "sel": ("selective", False), "seqsel": ("selective", True),
    "full": ("blocks", False),
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """One published figure and ours, in GiB."""

    name: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1


def rows() -> Iterator[Held]:
    """Parameters with their optimizer's state, then activations under each way to recompute, of the first rank."""
    for r in read("korthikanti_memory.csv"):
        model, mesh, micro_batch, batch, chunks = SHAPES[r["model"]]
        for way, (recompute, parallel) in WAYS.items():
            row = Row("", "", 0.0, model, mesh, micro_batch, batch, recompute, "a100-80gb", chunks, parallel)
            first = row.plan().memory_bytes[0]
            if way == "none":
                state = first["weights"] + first["gradients"] + first["optimizer"]
                yield Held(f"{r['model']} weights and optimizer", r["params_opt_GiB"], state / GIB)
            share = {"none": 100.0}.get(way) or r[f"act_pct_{way}"]
            published = r["act_seqsel_GiB"] if way == "seqsel" else r["act_none_GiB"] * share / 100
            live = first["activations"] + first["logits"] + first["boundary"]
            yield Held(f"{r['model']} activations, {way}", published, live / GIB)
