"""Plans made by hand, for the tests of what is drawn and printed: no model, no tracer, no planner."""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Crossing, Plan, StageMemory, StagePlan, Unit

GB = 1_000_000_000
PARTS = (("attn", "GPT2Attention", 6_000_000_000), ("mlp", "GPT2MLP", 8_000_000_000))


def make_units(blocks: int, stages: int, hub: bool = False) -> tuple[Unit, ...]:
    """Embedding, ``blocks`` blocks of two parts, norm, head, in equal runs; every attention reads the ``hub``."""
    rows: list[tuple[str, str, str, int, tuple[int, ...], int]] = []
    rows.append(("transformer.wte", "Embedding", "transformer.wte", 0, (), 154_389_504))
    if hub:
        rows.append(("transformer.rotary", "Rotary", "transformer.rotary", 1_000_000, (), 0))
    first = len(rows)
    for block in range(blocks):
        for part, kind, flops in PARTS:
            reads = (0,) if len(rows) == first else (len(rows) - 1,)
            reads += (1,) if hub and part == "attn" else ()
            rows.append((f"transformer.h.{block}.{part}", kind, f"transformer.h.{block}", flops, reads, 9_000_000))
    rows.append(("transformer.ln_f", "LayerNorm", "transformer.ln_f", 20_000_000, (len(rows) - 1,), 6_144))
    rows.append(("lm_head", "Linear", "lm_head", 40_000_000_000, (len(rows) - 1, 0), 154_389_504))
    return tuple(
        Unit(
            name=name,
            type=kind,
            block=block,
            stage=index * stages // len(rows),
            first=4 * index,
            stop=4 * index + 4,
            flops=flops,
            seconds=flops / 1e13 + 2e-5,
            param_bytes=nbytes,
            activation_bytes=3_000_000,
            reads=tuple(dict.fromkeys(reads)),
        )
        for index, (name, kind, block, flops, reads, nbytes) in enumerate(rows)
    )


def make_plan(blocks: int = 12, pp: int = 4, dp: int = 1, tp: int = 1, hub: bool = False, **more: object) -> Plan:
    """A believable plan of a GPT-2 with ``blocks`` blocks on ``pp`` stages; any field may be replaced."""
    units = make_units(blocks, pp, hub)
    stages = tuple(_stage(index, [u for u in units if u.stage == index], pp) for index in range(pp))
    crossings = tuple(
        Crossing(f"add_{4 * s}", (8, 512, 768), "bfloat16", 8 * 512 * 768 * 2, s, (s + 1,), True) for s in range(pp - 1)
    )
    if pp > 2:
        crossings += (
            Crossing("attention_mask", (8, 1, 512, 512), "bool", 8 * 512 * 512, 0, tuple(range(1, pp)), False),
        )
    fields: dict[str, object] = {
        "model": "GPT2LMHeadModel",
        "mesh": Mesh(dp, pp, tp),
        "schedule": "1f1b",
        "orders": (),
        "micro_batches": 8,
        "micro_batch": 8,
        "stages": stages,
        "crossings": crossings,
        "units": units,
        "ties": (("transformer.wte.weight", "lm_head.weight"),),
        "shared": {"transformer.wte.weight": (0, pp - 1)} if pp > 1 else {},
        "hardware": "a100-80gb",
        "memory_limit": 40 * GB,
        "rank_activation_bytes": tuple(stage.memory.live for stage in stages),
        "pipeline_seconds": 0.137,
        "after": {"optimizer": 0.002},
        "bubble": 0.213,
        "signature": {"input_ids": "int64[8, 512]", "labels": "int64[8, 512]"},
        "notes": ("compared 31 cuts, simulated 4", "stage 3 is the slowest: the head costs as much as 3 blocks"),
    }
    return Plan(**(fields | more))  # pyright: ignore[reportArgumentType]


def _stage(index: int, units: Sequence[Unit], pp: int) -> StagePlan:
    seconds = sum(u.seconds for u in units)
    weights = sum(u.param_bytes for u in units)
    live = pp - index
    return StagePlan(
        index=index,
        rank=index,
        start=units[0].first,
        stop=units[-1].stop,
        blocks=tuple(dict.fromkeys(u.block for u in units)),
        params=tuple(f"{u.name}.weight" for u in units),
        buffers=(),
        param_count=weights // 4,
        flops=sum(u.flops for u in units),
        forward_seconds=seconds / 3,
        backward_seconds=seconds * 2 / 3,
        weight_seconds=seconds / 3,
        recompute_seconds=seconds / 3 if index == 0 else 0.0,
        live_micro_batches=live,
        recompute=tuple(u.name for u in units)[:live] if index == 0 else (),
        memory=StageMemory(weights, weights, 2 * weights, live * 3 * GB, live * 6_291_456, 300_000_000),
    )
