"""What does the engine cost where it has nothing to do, and before it has begun? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/overhead/main.py

Three questions: a step of `auto_parallel(model, 1, 1, 1)` beside the plain loop; seconds from the start of a process to
the end of its first step; memory of each rank of a pipeline beside that of the whole model.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS, WARM = 9, 2
DEEP = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 256, "vocab_size": 32000}
"""For the memory: 110 million parameters, so that they stand out from what Python and torch take."""


def gpt(**config: Any) -> nn.Module:
    """GPT-2 without dropout, which the contenders would draw differently."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **config))


def small() -> nn.Module:
    """8 layers, 256 wide: a step takes about a second here."""
    return gpt(n_layer=8, n_embd=256, n_head=8, n_positions=128, vocab_size=8192)


def batch_of(samples: int, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Any text."""
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], float]:
    """The loop that everybody writes, with the norm of the gradients as the engine reports it."""
    optimizer = adamw(model.parameters())

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(model: nn.Module, batch: dict[str, Tensor], fuse: bool) -> Callable[[], float]:
    """The same through the engine."""
    from merak_like import auto_parallel

    engine = auto_parallel(
        model, 1, 1, 1, example=batch, optimizer=adamw, max_grad_norm=1.0, micro_batches=1, fuse=fuse, device="cpu"
    )
    return lambda: engine.step(batch).loss


def steps() -> dict[str, Any]:
    """Rounds in which all take turns; medians of CPU seconds and of the ratio within a round."""
    torch.set_num_threads(1)
    model, batch = small(), batch_of(8, 128, 8192)
    contenders = {
        "plain": plain(copy.deepcopy(model), batch), "engine, fuse=False": ours(copy.deepcopy(model), batch, False),
        "engine": ours(copy.deepcopy(model), batch, True),
    }  # fmt: skip
    losses, times = dict[str, list[float]](), {name: list[float]() for name in contenders}
    for turn in range(WARM + ROUNDS):
        for name in sorted(contenders, key=lambda n: (list(contenders).index(n) + turn) % len(contenders)):
            begin = time.process_time()
            losses.setdefault(name, []).append(contenders[name]())
            if turn >= WARM:
                times[name].append(time.process_time() - begin)
    assert all(abs(a - b) < 1e-4 for of in losses.values() for a, b in zip(of, losses["plain"], strict=True)), losses
    return {
        name: {
            "CPU milliseconds": round(1e3 * statistics.median(own), 1),
            "to plain": round(statistics.median(a / b for a, b in zip(own, times["plain"], strict=True)), 3),
        }
        for name, own in times.items()
    }


def first_step(how: str) -> dict[str, float]:
    """In a fresh process: seconds until the end of the first step, and of what they consist."""
    begun = time.time() - float(os.environ["MERAK_BEGUN"])
    mark = time.perf_counter()
    import transformers  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401

    libraries = begun + time.perf_counter() - mark
    mark = time.perf_counter()
    model, batch = small(), batch_of(8, 128, 8192)
    made = time.perf_counter() - mark
    mark = time.perf_counter()
    step = plain(model, batch) if how == "plain" else ours(model, batch, True)
    ready = time.perf_counter() - mark
    mark = time.perf_counter()
    step()
    return {"libraries": libraries, "model": made, "engine": ready, "first step": time.perf_counter() - mark}


def held() -> int:
    """Bytes of memory that the process has now, in pages of its own."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def memory(whole: bool) -> dict[str, int]:
    """Own pages after one step of SGD above those before the model was made."""
    torch.set_num_threads(1)
    import transformers  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401

    from merak_like import auto_parallel

    tiny = batch_of(1, 8, 32)
    plain(gpt(n_layer=1, n_embd=8, n_head=1, n_positions=8, vocab_size=32), tiny)()
    batch = batch_of(2, 32, DEEP["vocab_size"])
    if whole:
        before = held()
        model = gpt(**DEEP)
        model(**batch).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return {"weights": sum(p.nbytes for p in model.parameters()), "held": held() - before}
    before = held()
    with torch.device("meta"):
        model = gpt(**DEEP)
    engine = auto_parallel(
        model, 1, 4, 1, example=batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), micro_batches=2, device="cpu"
    )
    engine.step(batch)
    found = {"weights": sum(p.nbytes for p in engine.model.parameters() if not p.is_meta), "held": held() - before}
    engine.close()
    return found


def main() -> None:
    """Each question in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", choices=("steps", "first", "memory"))
    parser.add_argument("how", nargs="?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    here = Path(__file__)
    if args.question:
        acts = {"steps": steps, "first": lambda: first_step(args.how), "memory": lambda: memory(args.how == "whole")}
        text = json.dumps(acts[args.question]())
        (args.out.with_suffix("." + os.environ.get("RANK", "0")) if args.out else Path("/dev/stdout")).write_text(text)
        return

    def ask(*words: str, ranks: int = 0) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "said"
            job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERAK_BEGUN": str(time.time())}
            subprocess.run([sys.executable, *job, here, *words, "--out", out], check=True, env=environment)
            return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(ranks or 1)]

    (found,) = ask("steps")
    starts = {how: [ask("first", how)[0] for _ in range(3)] for how in ("plain", "engine")}
    result = {
        "setting": {
            "torch": torch.__version__, "Python": platform.python_version(), "rounds": ROUNDS,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 2),
        },
        "steps": found,
        "starts": {
            how: {part: round(statistics.median(run[part] for run in runs), 2) for part in runs[0]}
            for how, runs in starts.items()
        },
        "memory": {"whole": ask("memory", "whole")[0], "ranks": ask("memory", "ranks", ranks=4)},
    }  # fmt: skip
    here.with_name("results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
