"""The questions that are put to one GPU; each prints its lines as JSON. ``--dry-run``: on the CPU, tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from steps import (  # noqa: E402
    FULL,
    TINY,
    Size,
    adamw,
    batch_of,
    block,
    free,
    hardware,
    model_of,
    ours,
    plain,
    seconds,
    utilisation,
)

Lines = list[list[str]]


def throughput(size: Size, name: str, recompute: bool) -> Lines:
    """Steps of the engine against those of torch alone, both without a compiler."""
    with plain(size, name, checkpointing=recompute) as step:
        theirs = seconds(step, size)
    batch, tokens = batch_of(size, name, size.device), size.batch * size.seq
    with ours(size, name, micro_batches=1, recompute="full" if recompute else "none") as engine:
        mine = seconds(lambda: engine.step(batch), size)
        share = utilisation(engine, size, mine)
    where = f"{name}, {size.dtype}, {size.batch} x {size.seq}" + (", recompute" if recompute else "")
    return [
        [f"{where}: tokens a second, torch alone and the engine", "", f"{tokens / theirs:,.0f} {tokens / mine:,.0f}"],
        [f"{where}: the engine to torch alone", "0.98", f"{theirs / mine:.3f}"],
        [f"{where}: MFU", "", share],
    ]


def compiled(size: Size, name: str) -> Lines:
    """The same where both are compiled."""
    from merak_like.runtime.methods.compiled import Compiled

    with plain(size, name, compiled=True) as step:
        theirs = seconds(step, size)
    batch = batch_of(size, name, size.device)
    with ours(size, name, micro_batches=1, recompute="none", methods=[Compiled(backend=size.backend)]) as engine:
        mine = seconds(lambda: engine.step(batch), size)
        share = utilisation(engine, size, mine)
    return [
        [f"{name}, compiled: the engine to torch alone", "0.97", f"{theirs / mine:.3f}"],
        [f"{name}, compiled: MFU", "", share],
    ]


def fused(size: Size) -> Lines:
    """What a compiler fuses, in a block with dropout: the engine with ``Compiled`` against the engine without."""
    import torch

    from merak_like import auto_parallel
    from merak_like.runtime.methods.compiled import Compiled

    width, rows = (1024, (size.batch, size.seq)) if size.device == "cuda" else (32, (2, 16))
    model = block(width, width // 64 or 1).to(getattr(torch, size.dtype))
    batch = torch.randn(*rows, width, generator=torch.Generator().manual_seed(1)).to(getattr(torch, size.dtype))
    taken: list[float] = []
    for methods in ((), (Compiled(backend=size.backend),)):
        engine = auto_parallel(
            model, example=batch, optimizer=adamw, device=size.device, hardware=hardware(), methods=methods,
            micro_batches=1, recompute="none", loss_fn=lambda made, given: (made - given).float().square().mean(),
        )  # fmt: skip
        given = batch.to(size.device)
        taken.append(seconds(lambda engine=engine, given=given: engine.step(given), size))
        engine.close()
        del engine
        free()
    where = f"block of {width}, {size.dtype}, {rows[0]} x {rows[1]}: LayerNorm, softmax, dropout, GELU"
    return [[f"{where}: compiled to eager, time of a step", "", f"{taken[1] / taken[0]:.2f}"]]


def memory(size: Size, name: str) -> Lines:
    """What the planner says a rank holds beside what the allocator saw at its most."""
    import torch

    batch, lines = batch_of(size, name, size.device), Lines()
    for recompute in ("none", "full"):
        with ours(size, name, micro_batches=2, recompute=recompute) as engine:
            if size.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                engine.step(batch)
            said = max(engine.plan.rank_bytes)
            found = torch.cuda.max_memory_allocated() if size.device == "cuda" else 0
        del engine  # before the next one is built, or the allocator counts both
        free()
        off = f"{said / found - 1:+.1%}" if found else "no allocator to ask"
        lines.append(
            [f"{name}, recompute {recompute}: predicted {said / 2**30:.2f} GiB, found {found / 2**30:.2f}", "5%", off]
        )
    return lines


def costs(size: Size, name: str) -> Lines:
    """Seconds of F, R and B, and of W where it stands alone, against the cost model's."""
    from merak_like.partitioner.explain.calibration import calibrate
    from merak_like.partitioner.recorded import shares

    batch, lines = batch_of(size, name, size.device), Lines()
    for schedule, recompute in (("1f1b", "none"), ("1f1b", "full"), ("zb-h1", "none")):
        with ours(size, name, micro_batches=2, recompute=recompute, schedule=schedule) as engine:
            engine.step(batch)
            with engine.profile() as profile:
                for _ in range(3):
                    engine.step(batch)
            recorded, plan = profile.recorded, engine.plan
        del engine
        free()
        found = calibrate([(plan, recorded)])
        spent = shares(recorded.step(recorded.median))[0]
        kinds = {"F": spent.forward, "R": spent.recompute, "B": spent.backward, "W": spent.weight, "after": spent.after}
        told = ", ".join(f"{kind} {1e3 * value:.1f} ms" for kind, value in kinds.items() if value)
        lines.append([f"{name}, {schedule}, recompute {recompute}: {told}", "", f"model off by {found.error[0]:.0%}"])
    return lines


def codecs(size: Size) -> Lines:
    """Bytes of activations that each codec takes in and gives back a second."""
    import torch

    from merak_like.runtime.codecs import Context, codec

    elements = 2**24 if size.device == "cuda" else 2**12
    x, lines = torch.randn(elements // 1024 or 1, min(elements, 1024), device=size.device), Lines()
    for text in ("identity", "fp16", "bf16", "int8", "int4", "int2", "sign", "topk(0.1)"):
        near, far = codec(text), codec(text)
        context = Context(device=x.device)
        frame = near.encode(x, context)
        there = seconds(lambda near=near, context=context: near.encode(x, context), size)
        back = seconds(lambda far=far, frame=frame, context=context: far.decode(frame, context), size)
        lines.append(
            [f"`{text}`: GB/s encoded, decoded", "", f"{x.nbytes / there / 1e9:.3g} {x.nbytes / back / 1e9:.3g}"]
        )
    return lines


def two_ranks(size: Size) -> Lines:
    """Two processes on the one device, their gradients summed over gloo, against one."""
    small = Size(size.device, "float32", 4, 32, 1, TINY.models, size.backend)
    alone = _losses(small)
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 1000)}
    words = [sys.executable, __file__, "rank_of_two", *(["--dry-run"] if size.device == "cpu" else [])]
    ranks = [
        subprocess.Popen(words, env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads(text.splitlines()[-1])["losses"] for text in said if text.strip()]
    if len(found) != 2:
        raise SystemExit("a rank ended without losses")
    off = max(abs(a - b) for losses in found for a, b in zip(losses, alone, strict=True))
    return [
        ["dp=2 over gloo on one device: losses of 3 steps differ from one process by at most", "1e-5", f"{off:.0e}"]
    ]


def rank_of_two(size: Size) -> None:
    """One of them."""
    import torch.distributed as dist

    small = Size(size.device, "float32", 4, 32, 1, TINY.models, size.backend)
    dist.init_process_group("gloo")
    print(json.dumps({"losses": _losses(small, dp=2)}), flush=True)
    dist.destroy_process_group()


def _losses(size: Size, dp: int = 1) -> list[float]:
    from merak_like import auto_parallel

    device = f"{size.device}:0" if size.device == "cuda" else "cpu"
    batch = batch_of(size, "GPT-2 XL", "cpu")
    engine = auto_parallel(
        model_of(size, "GPT-2 XL", "meta"), dp, 1, 1, example=batch, optimizer=adamw, device=device, timeout=60.0,
        micro_batches=2 // dp,
    )  # fmt: skip
    found = [float(engine.step(batch).loss) for _ in range(3)]
    engine.close()
    return found


class Row(NamedTuple):
    """One question."""

    title: str
    ask: Callable[[Size], Lines]
    most: float = 60.0
    """Seconds after which it is given up, so that no row takes the others' time."""


ROWS = {
    "throughput_llama": Row("throughput", lambda size: throughput(size, "Llama 1B", False)),
    "throughput_gpt2": Row("throughput", lambda size: throughput(size, "GPT-2 XL", False)),
    "recompute_llama": Row("throughput", lambda size: throughput(size, "Llama 1B", True)),
    "recompute_gpt2": Row("throughput", lambda size: throughput(size, "GPT-2 XL", True)),
    "memory_llama": Row("memory", lambda size: memory(size, "Llama 1B")),
    "memory_gpt2": Row("memory", lambda size: memory(size, "GPT-2 XL")),
    "costs_llama": Row("cost model", lambda size: costs(size, "Llama 1B")),
    "codecs": Row("codecs", codecs),
    "two_ranks": Row("two ranks", two_ranks),
    "fused": Row("fused kernels", fused),
    "compiled_llama": Row("throughput", lambda size: compiled(size, "Llama 1B"), 120.0),
    "compiled_gpt2": Row("throughput", lambda size: compiled(size, "GPT-2 XL"), 120.0),
}
"""The dearest last: what does not fit into the time is left out and named."""

if __name__ == "__main__":
    chosen = TINY if "--dry-run" in sys.argv else FULL
    if sys.argv[1] == "rank_of_two":
        rank_of_two(chosen)
    else:
        print(json.dumps({"lines": ROWS[sys.argv[1]].ask(chosen)}))
