"""What a codec is worth between two pipeline stages on hosts with a slow link. Needs root (network namespaces, `tc`).

python benchmarks/pipeline/slow.py              writes slow.json

On each link one job trains a GPT-2 with every codec in turn, round after round, on the same samples; medians of rounds,
and of a step's bytes those that the busier rank sends, from the samples' second visit on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers
from contenders import gpt2

from merak_like import auto_parallel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from lab import missing, two_hosts  # noqa: E402

LAYERS, HIDDEN, SEQ, MICRO_BATCHES, MICRO_BATCH, ROUNDS = 8, 256, 128, 8, 2, 7
CODECS = {"none": None} | {text: text for text in ("fp16", "int8", "int4|int8", "int4", "aqsgd(4)|int4")}
LINKS = {"unshaped": None, "1 Gbit": 1e9, "100 Mbit": 100e6, "20 Mbit": 20e6}


def job(out: Path) -> None:
    """One process of two."""
    torch.set_num_threads(1)
    ids = torch.randint(0, 1000, (MICRO_BATCHES * MICRO_BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    engines = {}
    for name, text in CODECS.items():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(gpt2(LAYERS, HIDDEN, SEQ)).train()
        engines[name] = auto_parallel(
            model, 1, 2, example=batch, micro_batches=MICRO_BATCHES, optimizer=torch.optim.AdamW, device="cpu",
            hardware="a100-80gb", codec=text,
        )  # fmt: skip
    sent, samples = {}, range(len(ids))
    for name, engine in engines.items():
        engine.step(batch, samples=samples)
        with counted() as bytes_:
            engine.step(batch, samples=samples)
        sent[name] = bytes_[0]
    times: dict[str, list[float]] = {name: [] for name in engines}
    losses = dict[str, float]()
    for turn in range(ROUNDS):
        for name in sorted(engines, key=lambda n: (list(engines).index(n) + turn) % len(engines)):
            dist.barrier()
            begin = time.perf_counter()
            losses[name] = engines[name].step(batch, samples=samples).loss
            dist.barrier()
            times[name].append(time.perf_counter() - begin)
    most = torch.tensor([sent[name] for name in engines])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        rows = {
            name: {
                "milliseconds": 1e3 * statistics.median(own), "kilobytes": each / 1e3, "loss": losses[name],
                "to none": statistics.median(a / b for a, b in zip(own, times["none"], strict=True)),
            }
            for (name, own), each in zip(times.items(), most.tolist(), strict=True)
        }  # fmt: skip
        out.write_text(json.dumps(rows))
    for engine in engines.values():
        engine.close()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process sends to another stage."""
    total, before = [0], dist.isend

    def isend(tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        total[0] += tensor.nbytes
        return before(tensor, *more, **named)

    with mock.patch.object(dist, "isend", isend):
        yield total


def main() -> None:
    """Run the jobs, on every link one."""
    if why := missing():
        sys.exit(f"slow links are made of network namespaces, and there are none: {why}")
    links = {}
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
        for link, rate in LINKS.items():
            hosts.shape(rate)
            out = Path(folder) / "rows.json"
            hosts.torchrun([str(HERE / "slow.py"), str(out)], timeout=900, environment={"OMP_NUM_THREADS": "1"})
            links[link] = json.loads(out.read_text())
            print(link, json.dumps(links[link], indent=1))
    setting = {
        "layers": LAYERS, "hidden": HIDDEN, "sequence": SEQ, "micro-batches": f"{MICRO_BATCHES} x {MICRO_BATCH}",
        "rounds": ROUNDS, "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    (HERE / "slow.json").write_text(json.dumps({"setting": setting, "links": links}, indent=1) + "\n")


if __name__ == "__main__":
    job(Path(sys.argv[1])) if sys.argv[1:] else main()
