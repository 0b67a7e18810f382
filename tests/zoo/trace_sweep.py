"""Every pair of transformers that trains, and every named case: traced, cut into 2 and 3 stages, compared.

`python -m tests.zoo.trace_sweep` writes trace_status.json: which are equal to the plain model in loss, every gradient
and every buffer, and one line on why each of the others is not. It goes on where it stopped; `--again` asks once more
for what failed, `--all` for everything. `python -m tests.zoo.support_matrix` makes the document from it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.zoo import sweep
from tests.zoo.case import Batch
from tests.zoo.hugging_face import cases
from tests.zoo.staged import TOLERANCE, compare

STATUS = Path(__file__).with_name("trace_status.json")
SECONDS = 90
NAMED = "named case"
"""In place of the task: the model type is the name of a case in hugging_face.py."""


def questions() -> list[str]:
    """Everything to be asked, as "type/task"."""
    return [*sweep.read()["trains"], *(f"{case.name}/{NAMED}" for case in cases(attentions=True))]


def attempt(model_type: str, task: str) -> tuple[str, str]:
    """(why the pair is not equal in stages or "", the largest difference)."""
    try:
        torch.manual_seed(0)
        loss_fn = None
        if task == NAMED:
            case = next(case for case in cases(attentions=True) if case.name == model_type)
            model, batch = case.build(), case.batch()
        else:
            model, batch = sweep.build(model_type, task)
            if "computes no loss" in sweep.read()["notes"].get(f"{model_type}/{task}", ""):
                loss_fn = _loss_fn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compare(model, batch, loss_fn)
            if found.worst < TOLERANCE:
                return "", f"{found.worst:.1e}"
            again = compare(model, batch, loss_fn, settled=True)
        if again.worst < TOLERANCE:
            return "", f"{again.worst:.1e} from the second forward on"
        return f"differs by {found.worst:.1e}: {found.where}", ""
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400], ""


def _loss_fn(output: Any, batch: Batch) -> torch.Tensor:
    return sweep.loss_of(output)


def read() -> dict[str, Any]:
    """The status: "type/task" that are equal with their largest difference, and a reason for each that is not."""
    return json.loads(STATUS.read_text()) if STATUS.exists() else {"equal": {}, "fails": {}}


def write(equal: dict[str, str], fails: dict[str, str]) -> dict[str, int]:
    """Save what is known so far; the counts."""
    pairs = [n for n in (*equal, *fails) if not n.endswith(NAMED)]
    good = [n for n in equal if not n.endswith(NAMED)]
    counts = {
        "pairs": len(pairs), "pairs equal": len(good), "pairs bitwise equal": sum(equal[n] == "0.0e+00" for n in good),
        "model types": len({n.split("/")[0] for n in pairs}),
        "named cases": len(equal) + len(fails) - len(pairs), "named cases equal": len(equal) - len(good),
    }  # fmt: skip
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    status = versions | {"counts": counts, "equal": dict(sorted(equal.items())), "fails": dict(sorted(fails.items()))}
    STATUS.write_text(json.dumps(status, indent=1) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.trace_sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--again", action="store_true", help="ask again for what failed")
    parser.add_argument("--all", action="store_true", help="ask again for everything")
    parser.add_argument("only", nargs="*", help="only these type/task, printed and not saved")
    options = parser.parse_args()
    status = {"equal": {}, "fails": {}} if options.all else read()
    equal, fails = status["equal"], {} if options.again else status["fails"]
    worker = sweep.Worker(attempt, SECONDS)
    for name in options.only or questions():
        if not options.only and (name in equal or name in fails):
            continue
        model_type, _, task = name.partition("/")
        failure, note = worker.attempt(model_type, task)
        print(f"{name:50} {failure or note}", flush=True)
        if not options.only:
            (fails if failure else equal)[name] = failure or note
            write(equal, fails)
    print(json.dumps(write(equal, fails)) if not options.only else "")


if __name__ == "__main__":
    main()
