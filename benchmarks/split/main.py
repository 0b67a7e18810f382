"""How many bytes does a step of split fine-tuning put on the socket? Counted there, both ways, headers included.

    python -m benchmarks.split.main         writes wire.json, which `benchmarks/tables.py` puts into the README

In two minutes of two cores; the numbers do not depend on the machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText, Task

OUT = Path(__file__).parent / "wire.json"
BATCH, TOKENS = 32, 128
ROWS = {
    "bert.encoder.layer.0": ["identity", "aqsgd(2)|int2"],
    "bert.encoder.layer.1@8": ["identity", "aqsgd(4)|int4"],
    "bert.encoder.layer.0:bert.pooler.dense": ["identity"],
    "bert.encoder.layer.1@8:bert.pooler.dense": ["identity", "aqsgd(4)|int4"],
}
"""Cuts and codecs; the first of those without a tail, and of those with one, is what the others are compared to."""


def work() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of bert-base's width, and a batch with one text that is shorter."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, num_hidden_layers=3, max_position_embeddings=TOKENS, num_labels=2,  # pyright: ignore[reportCallIssue]
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    ids = torch.randint(1, 1000, (BATCH, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    batch["attention_mask"][3, 100:] = 0
    return model, batch


def main() -> None:
    """Count, and write."""
    model, batch = work()
    rows = list[dict[str, Any]]()
    for cut, codecs in ROWS.items():
        for codec in codecs:
            rows.append({"cut": cut, "codec": codec, "bytes": bytes_of(model, batch, cut, codec)})
            print(rows[-1], flush=True)
    setting = {"width": 768, "samples": BATCH, "tokens": TOKENS, "micro-batches": 1}
    found = {"setting": {**setting, "torch": torch.__version__}, "rows": rows}
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def bytes_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], cut: str, codec: str) -> int:
    """Of the second step: the first sends samples whole that a codec does not know yet."""
    source = Source(lambda: copy.deepcopy(model))
    task = Task(cut=cut, codec=codec, optimizer=OptimizerText(lr=1e-5), checkpoint_every=1000)
    with (
        tempfile.TemporaryDirectory() as folder,
        Host(source, cut, listen="127.0.0.1:0", folder=Path(folder) / "host") as host,
        Edge(source, task, batch, connect=f"127.0.0.1:{host.port}", folder=Path(folder) / "edge") as edge,
    ):
        total = []
        for _ in range(2):
            edge.step(batch, samples=range(BATCH))
            total.append(edge.bytes["sent"] + edge.bytes["received"])
    return total[1] - total[0]


if __name__ == "__main__":
    main()
