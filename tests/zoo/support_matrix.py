"""docs/support-matrix.md from trace_status.json: `python -m tests.zoo.support_matrix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zoo import sweep, trace_sweep
from tests.zoo.hugging_face import cases
from tests.zoo.staged import TOLERANCE

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "support-matrix.md"
SHORT = {
    "causal-lm": "causal", "seq2seq-lm": "seq2seq", "masked-lm": "masked", "sequence-classification": "sequence class.",
    "image-classification": "image class.",
}  # fmt: skip


HEAD = """# Which models train in stages

<!-- Made by `python -m tests.zoo.support_matrix`; do not edit. -->

**{pairs equal} of {pairs}** (model type, task) pairs of transformers {transformers} ({share:.1%}) and
**{named cases equal} of {named cases}** named cases, with torch {torch}.

A pair is the default config of a model type made tiny, unmodified, in train mode with its dropout. It is traced once
and cut into 2 and into 3 stages. It is equal if the loss, every gradient and every buffer are those of the plain model
after one step from the same seed: no element may differ by more than {tolerance:g} of the tensor's largest (of 0.01,
where that is smaller). {pairs bitwise equal} pairs are bitwise equal; in the others a gradient that comes from several
stages is summed in another order. `python -m tests.zoo.trace_sweep --all` makes the list anew, in about half an hour.

Pairs that do not build or train in plain PyTorch here are left out: {left_out}.

## Not supported

| pair | why |
| --- | --- |"""

LATE = """
## Equal from the second forward on

The plain model replaces modules in its first forward, and draws random numbers to fill weights it then throws away:
{late}.

## Every model type

`=` bitwise equal, `ok` equal within the tolerance, `no` see above, empty where transformers has no such pair.
"""

NAMED = """
## Named cases

Tiny models with hand-made configs: dropout 0.1 everywhere, padding, ties; one per attention kernel the model has.

| case | kind | kernel | result | largest difference |
| --- | --- | --- | :---: | ---: |"""


def document(status: Mapping[str, Any], trains: Mapping[str, Any]) -> str:
    """The whole document."""
    counts, fails = status["counts"], status["fails"]
    pairs = {n: e for n, e in status["equal"].items() if not n.endswith(trace_sweep.NAMED)}
    refused = {n: reason for n, reason in fails.items() if not n.endswith(trace_sweep.NAMED)}
    late = [name for name, worst in pairs.items() if "second" in worst]
    known = {*pairs, *refused}
    share = counts["pairs equal"] / counts["pairs"]
    left_out = ", ".join(sorted(trains["fails"]))
    lines = [
        HEAD.format(share=share, tolerance=TOLERANCE, left_out=left_out, **counts, **status),
        *(f"| {name} | {_cell(reason, trains['notes'].get(name, ''))} |" for name, reason in refused.items()),
        LATE.format(late=", ".join(late)),
        "| model type | " + " | ".join(SHORT.values()) + " |",
        "| --- |" + " :---: |" * len(SHORT),
    ]
    for model_type in sorted({name.split("/")[0] for name in known}):
        row = [_mark(f"{model_type}/{task}", pairs, refused) for task in SHORT]
        lines.append(f"| {model_type} | " + " | ".join(row) + " |")
    lines.append(NAMED)
    for case in cases(attentions=True):
        name = f"{case.name}/{trace_sweep.NAMED}"
        result = "ok" if name in status["equal"] else "no"
        worst = status["equal"].get(name) or _cell(fails.get(name, "not run"))
        worst = "0" if worst == "0.0e+00" else worst
        lines.append(f"| {case.name.split('[')[0]} | {case.kind} | {case.attention or ''} | {result} | {worst} |")
    return "\n".join(lines) + "\n"


def _mark(name: str, pairs: Mapping[str, str], refused: Mapping[str, str]) -> str:
    if name in refused:
        return "no"
    return "" if name not in pairs else "=" if pairs[name] == "0.0e+00" else "ok"


def _cell(reason: str, note: str = "") -> str:
    more = f" (in plain PyTorch: {note})" if note else ""
    return (reason + more).replace("|", "\\|").replace("_", "\\_")


def main() -> None:
    DOCUMENT.write_text(document(trace_sweep.read(), sweep.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
