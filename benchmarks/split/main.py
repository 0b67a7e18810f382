"""How many bytes does a step of split fine-tuning put on the socket? Counted there, both ways, headers included."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import copy
import tempfile
from pathlib import Path

import torch

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText, Task

BATCH, TOKENS = 32, 128
ROWS = {
    "bert.encoder.layer.0": ["identity", "aqsgd(2)|int2"],
    "bert.encoder.layer.1@8": ["identity", "aqsgd(4)|int4"],
    "bert.encoder.layer.0:bert.pooler.dense": ["identity"],
    "bert.encoder.layer.1@8:bert.pooler.dense": ["identity", "aqsgd(4)|int4"],
}
"""Cuts and codecs; the first of those without a tail, and of those with one, is what the others are compared to."""


def main() -> None:
    """Print the table."""
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
    plain: dict[bool, int] = {}
    print("| cut | codec | bytes a step, both ways | times fewer |\n| --- | --- | ---: | ---: |")
    for cut, codecs in ROWS.items():
        for codec in codecs:
            count = bytes_of(model, batch, cut, codec)
            first = plain.setdefault(":" in cut, count)
            print(f"| `{cut}` | `{codec}` | {count} | {first / count:.1f} |", flush=True)


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
