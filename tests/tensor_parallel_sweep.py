"""Every pair of transformers that trains, sharded over 2 ranks: how much, whether the numbers agree, and whose plan.

`python -m tests.tensor_parallel_sweep` writes tensor_parallel_status.json: of each pair the share of the blocks' matrix
parameters that is sharded, the largest difference of the whole model and of its blocks alone; of each family with a
hand-written plan the weights that we do not shard in the same dimension. It goes on where it stopped; `--all` begins
anew (about eight minutes).
"""

from __future__ import annotations

import argparse
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from merak_like.partitioner.tensor_parallel.prove import prove
from tests.tensor_parallel_models import BODY, differences, families_with_a_plan, pair
from tests.zoo import sweep

STATUS = Path(__file__).with_name("tensor_parallel_status.json")
SECONDS, WORKERS = 120, 2
EXACT = 1e-8
"""A probe in float64 that differs by less agrees."""
MOST = 0.9
"""A pair with this share of its blocks' matrix parameters sharded counts as sharded."""


def questions() -> list[str]:
    """Everything to be asked, as "type/task"."""
    bodies = [f"{model_type}/{task}" for model_type, task in families_with_a_plan() if task == BODY]
    return [*sweep.read()["trains"], *bodies]


def attempt(model_type: str, task: str) -> tuple[str, str]:
    """(why nothing was derived or "", what was, as JSON)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pair(model_type, task)
            found = made.probe()
            proven = prove(made.model, made.trace, made.derived, made.batch)
        weights, differ = differences(made)
        answer: dict[str, Any] = {"share": round(made.derived.share, 3), "worst": float(f"{found.worst:.1e}")}
        answer["alone"] = float(f"{proven.worst:.1e}")
        if ways := sorted({block.way for block in proven.blocks.values()} - {"tiny", "nothing is sharded"}):
            answer["ways"] = ways
        if proven.failed:
            answer["refused"] = {name: f"{block.way}: {block.where}"[:200] for name, block in proven.failed.items()}
        if weights:
            answer |= {"plan": weights, "differs": differ}
        return "", json.dumps(answer)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240], ""


def read() -> dict[str, Any]:
    """The status: what was found by "type/task", and a reason for each where nothing was."""
    return json.loads(STATUS.read_text()) if STATUS.exists() else {"found": {}, "fails": {}}


def write(found: dict[str, Any], fails: dict[str, str]) -> dict[str, int]:
    """Save what is known so far; the counts."""
    of_pairs = {name: item for name, item in found.items() if not name.endswith(f"/{BODY}")}
    plans = {name.split("/")[0]: item for name, item in found.items() if "plan" in item}
    counts = {
        "pairs": len([name for name in (*found, *fails) if not name.endswith(f"/{BODY}")]),
        "pairs sharded": sum(item["share"] >= MOST for item in of_pairs.values()),
        "pairs exact": sum(item["worst"] < EXACT for item in of_pairs.values()),
        "families with a plan": len(plans),
        "families that agree with their plan": sum(not item["differs"] for item in plans.values()),
    }
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    status = versions | {"counts": counts, "found": dict(sorted(found.items())), "fails": dict(sorted(fails.items()))}
    STATUS.write_text(json.dumps(status, indent=1) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tensor_parallel_sweep", description="See the file.")
    parser.add_argument("--all", action="store_true", help="ask again for everything")
    parser.add_argument("only", nargs="*", help="only these type/task, printed and not saved")
    options = parser.parse_args()
    status = {"found": {}, "fails": {}} if options.all else read()
    found, fails = status["found"], status["fails"]
    asked = iter(options.only or [name for name in questions() if name not in found and name not in fails])
    writing = threading.Lock()

    def work(_: int) -> None:
        worker = sweep.Worker(attempt, SECONDS)
        while True:
            with writing:
                name = next(asked, "")
            if not name:
                return
            failure, answer = worker.attempt(*name.split("/"))
            print(f"{name:50} {failure or answer}", flush=True)
            with writing:
                if failure:
                    fails[name] = failure
                else:
                    found[name] = json.loads(answer)
                if not options.only:
                    write(found, fails)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    if not options.only:
        print(json.dumps(write(found, fails)))


if __name__ == "__main__":
    main()
