"""How long is a step over a slow uplink? Two network namespaces, the edge's end of the cable held to 20 Mbit/s by `tc`.

    OMP_NUM_THREADS=1 python -m benchmarks.split.line             what line.json lacks, row by row (as root)
    OMP_NUM_THREADS=1 python -m benchmarks.split.line --again     everything
    python benchmarks/tables.py                                   the table, accuracy from learning.json beside it

A step should take little more than the longer of its computing and its sending.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab import ADDRESS, Hosts, missing, two_hosts
from merak_like.partitioner.this_machine import this_machine
from merak_like.split import keys
from merak_like.split.edge import Edge
from merak_like.split.forecast import forecast
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.means import Means, line
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.tls import Keys

RATE = 20e6
BATCH, TOKENS, LAYERS, MICRO_BATCHES, STEPS = 64, 64, 3, 16, 15
PORT = 7750
CUT = "bert.encoder.layer.0:bert.pooler.dense"
CODECS = ("fp16", "int8", "int4", "int2|int4", "aqsgd(4)|int4", "aqsgd(2)|int4", "topk(0.1)", "sign|int8")
Row = tuple[int, str, tuple[int, ...]]
ROWS: tuple[Row, ...] = (
    (128, "identity", (1, 2, 4, 8)), *((128, codec, (4,)) for codec in CODECS), (256, "identity", (4,)),
    (256, "aqsgd(4)|int8", (4,)),
)  # fmt: skip
"""Width of the model, codec, micro-batches under way at once: an edge each, in one process, one after the other."""
OUT = Path(__file__).with_name("line.json")


def model(width: int) -> torch.nn.Module:
    """A BERT without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return BertForSequenceClassification(config)


def main() -> None:
    """Measure every row that is not in the file yet; each is written as it ends."""
    if why := missing():
        raise SystemExit(f"no lab here: {why}")
    rows: list[dict[str, Any]] = []
    if OUT.is_file() and "--again" not in sys.argv:
        rows = json.loads(OUT.read_text(encoding="utf-8"))["rows"]
    known = {(row["width"], row["codec"], row["under way"]) for row in rows}
    for row in ROWS:
        if known >= {(*row[:2], window) for window in row[2]}:
            continue
        with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
            found = run(hosts, Path(folder), row)
        for window, one in zip(row[2], found, strict=True):
            load = round(os.getloadavg()[0], 1)
            rows.append({"width": row[0], "codec": row[1], "under way": window, **one, "load average": load})
            print(json.dumps(rows[-1]), flush=True)
        setting = {"Mbit/s": RATE / 1e6, "samples": BATCH, "tokens": TOKENS, "layers": LAYERS,
                   "micro-batches": MICRO_BATCHES, "torch": torch.__version__}  # fmt: skip
        OUT.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def run(hosts: Hosts, folder: Path, row: Row) -> list[dict[str, float]]:
    """A host and its edges over mutual TLS, first without a limit, then with; what was found for each edge."""
    keys.init(folder / "keys")
    keys.issue(folder / "keys", "host", hosts=[ADDRESS.format(2)])
    keys.issue(folder / "keys", "ann")
    start: Callable[[int, str], Any] = lambda at, what: subprocess.Popen(  # noqa: E731
        ["ip", "netns", "exec", hosts.names[at], sys.executable, "-m", "benchmarks.split.line", what, str(folder),
         json.dumps(row)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with start(1, "host") as host, start(0, "edge") as edge:
        assert edge.stdin is not None
        try:
            free = heard(edge)
            hosts.shape_one(0, RATE)
            edge.stdin.write("go on\n")
            edge.stdin.flush()
            held = heard(edge)
            edge.wait(60)
        finally:
            edge.kill()
            host.kill()
    return [one | other for one, other in zip(free, held, strict=True)]


def heard(edge: subprocess.Popen[str]) -> list[dict[str, float]]:
    """The next line of a process. Raises SystemExit where it has ended without."""
    assert edge.stdout is not None
    if not (line := edge.stdout.readline()):
        raise SystemExit(f"the edge ended with {edge.wait(60)}; what went wrong is above")
    return json.loads(line)


def play_host(folder: Path, row: Row) -> None:
    """Serve until killed."""
    there = Host(Source(partial(model, row[0])), CUT, listen=f"{ADDRESS.format(2)}:{PORT}", folder=folder / "host",
                 keys=Keys(folder / "keys", "host"))  # fmt: skip
    there.run()


def play_edge(folder: Path, row: Row) -> None:
    """Train without a limit, say how long a step took, wait for a line, and go on with it; each edge in turn."""
    width, codec, windows = row
    ids = torch.randint(1, 1000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    source, here = Source(partial(model, width)), this_machine()
    means = Means(here, here, line("20 Mbit"), line("10 Gbit"))
    tasks = [
        Task(cut=CUT, codec=codec, micro_batches=MICRO_BATCHES, window=window, checkpoint_every=1000,
             optimizer=OptimizerText(lr=1e-4))
        for window in windows
    ]  # fmt: skip
    told = [forecast(source, task, batch, means, samples=True) for task in tasks]
    with ExitStack() as opened:
        edges = [
            opened.enter_context(
                Edge(source, task, batch, connect=f"{ADDRESS.format(2)}:{PORT}", folder=folder / f"edge-{task.window}",
                     keys=Keys(folder / "keys", "ann"))
            )
            for task in tasks
        ]  # fmt: skip
        free = [steps(edge, batch)[0] for edge in edges]
        say([{"free": seconds, "predicted": each.seconds} for seconds, each in zip(free, told, strict=True)])
        sys.stdin.readline()
        held = [steps(edge, batch) for edge in edges]
        assert [sent for _, sent in held] == [each.sent for each in told]
        say([{"held": seconds, "bytes": sent, "sending": 8 * sent / RATE} for seconds, sent in held])


def steps(edge: Edge, batch: Any) -> tuple[float, int]:
    """Seconds of the fastest step, for other processes of the machine only add; bytes that it sends."""
    seconds, sent = list[float](), 0
    for _ in range(2 + STEPS):
        before, began = edge.bytes["sent"] - edge.bytes["sent PING"], time.monotonic()
        edge.step(batch, samples=range(BATCH))
        seconds.append(time.monotonic() - began)
        sent = edge.bytes["sent"] - edge.bytes["sent PING"] - before
    return min(seconds[2:]), sent


def say(found: list[dict[str, float]]) -> None:
    """To the process that started this one."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--again"]):
        main()
    else:
        {"host": play_host, "edge": play_edge}[sys.argv[1]](Path(sys.argv[2]), tuple(json.loads(sys.argv[3])))
