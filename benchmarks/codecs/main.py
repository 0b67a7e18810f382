"""What does each codec cost and lose? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/codecs/main.py            measure, write results.json, fill the README's table
    python benchmarks/codecs/main.py --table [--check]            only the table, from results.json

Speeds are of CPU time, the best of several turns, so that what else the machine does hardly shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from page import fill

HERE = Path(__file__).parent
CODECS = (
    "identity", "fp16", "bf16", "int8", "int4", "int4|int8", "int2|int8", "sign|int8", "sign", "topk(0.1)",
    "topk(0.1)+int4", "randtopk(0.1)", "c3sl(2)", "c3sl(4)", "c3sl(16)", "aqsgd(4)", "aqsgd(4)|int4", "aqsgd(2)|int8",
    "aqsgd(2)+deflate|int8", "deflate",
)  # fmt: skip


def seconds(work: Callable[[], Any], turns: int = 9) -> float:
    """CPU seconds of one call, the best of some."""
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def wire(name: str, first: Any, second: Any) -> dict[str, float]:
    """Bytes, speed and error of an activation (the sample's second visit), without training through the codec."""
    from merak_like.runtime.codecs import Context, codec

    near, far = codec(name), codec(name)
    before, context = (Context(step=step, samples=tuple(range(len(first)))) for step in (0, 1))
    far.decode(near.encode(first, before), before)
    states = near.state_dict(), far.state_dict()
    frame = near.encode(second, context)
    error = (far.decode(frame, context) - second).norm() / second.norm()

    def again(end: Any, state: Any, work: Callable[[], Any]) -> float:
        """Seconds of one transfer; a codec with memory must start each turn from the same one."""
        best = float("inf")
        for _ in range(9):
            end.forget()
            end.load_state_dict(state)
            best = min(best, seconds(work, 1))
        return best

    megabytes = second.nbytes / 1e6
    return {
        "bytes per element": frame.numel() / second.numel(),
        "ratio": second.nbytes / frame.numel(),
        "encode MB/s": megabytes / again(near, states[0], lambda: near.encode(second, context)),
        "decode MB/s": megabytes / again(far, states[1], lambda: far.decode(frame, context)),
        "error": error.item(),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every row."""
    import torch
    from workloads import BATCH, SAMPLES, SEQUENCE, WIDTH, digits, language_model

    torch.set_num_threads(1)
    _, activations = language_model("identity", args.epochs)
    first, second = activations()
    have_digits = find_spec("sklearn") is not None
    if not have_digits:
        print("scikit-learn is not installed: the digits are left out")
    rows: dict[str, Any] = {}
    for name in CODECS:
        row: dict[str, Any] = {"wire": wire(name, first, second)}
        row["text"] = language_model(name, args.epochs)[0]
        if have_digits:
            runs = [digits(name, args.digit_epochs, seed) for seed in range(args.seeds)]
            row["digits"] = {
                "accuracy": statistics.mean(run["accuracy"] for run in runs),
                "lowest": min(run["accuracy"] for run in runs),
                "highest": max(run["accuracy"] for run in runs),
                "ratio": runs[0]["ratio"],
            }
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    setting = {
        "activation": f"float32 [{BATCH}, {SEQUENCE}, {WIDTH}]",
        "text": f"{SAMPLES} samples of {SEQUENCE} letters",
        "epochs on text": args.epochs,
        "epochs on digits": args.digit_epochs,
        "seeds on digits": args.seeds,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, 1 thread",
    }
    return {"setting": setting, "rows": rows}


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| codec | bytes per element | times less | encode, MB/s | decode, MB/s | error of an activation "
        "| text: last error | text: loss | digits: times less, both ways | digits: accuracy (3 seeds) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in data["rows"].items():
        cells = [
            f"{row['wire']['bytes per element']:.3f}",
            f"{row['wire']['ratio']:.1f}",
            f"{row['wire']['encode MB/s']:.0f}",
            f"{row['wire']['decode MB/s']:.0f}",
            f"{row['wire']['error']:.4f}",
            f"{row['text']['error']:.4f}",
            f"{row['text']['loss']:.3f}",
        ]
        if "digits" in row:
            found = row["digits"]
            spread = f"{found['accuracy']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f})"
            cells += [f"{found['ratio']:.1f}", spread]
        else:
            cells += ["", ""]
        lines.append(f"| `{name.replace('|', chr(92) + '|')}` | " + " | ".join(cells) + " |")
    setting = "Setting: " + ", ".join(f"{key} {value}" for key, value in data["setting"].items()) + "."
    return "\n".join([*lines, "", setting])


def main() -> int:
    """Measure, or only fill the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the language model")
    parser.add_argument("--digit-epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only fill the README's table")
    parser.add_argument("--check", action="store_true", help="with --table: only say whether it is up to date")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    if not args.table:
        args.out.write_text(json.dumps(measure(args), indent=1) + "\n", encoding="utf-8")
    data = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    return fill("codecs", table(data), args.check)


if __name__ == "__main__":
    sys.exit(main())
