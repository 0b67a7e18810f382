"""What does SFT's narrow place cost, by rank, and with a codec on its wire? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/codecs/sft.py             measure, write sft.json, fill the README's table
    python benchmarks/codecs/sft.py --table [--check]             only the table, from sft.json

A letter model is trained on the first half of Python's documentation and fine-tuned on samples of the second, cut in
the second of its four layers; the loss is that of samples it never saw, without the codec.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

from page import fill

HERE = Path(__file__).parent
LAYER, WIDTH, SEQUENCE, BATCH = "blocks.1", 96, 64, 32


class Variant(NamedTuple):
    """What is changed before fine-tuning."""

    name: str
    rank: int | None = None
    skip: str = "none"
    weighted: bool = False
    codec: str = "identity"


VARIANTS = (
    Variant("not cut"),
    Variant("residual link removed, full rank", WIDTH),
    *(Variant(f"rank {rank}", rank) for rank in (16, 8, 4, 2)),
    Variant("rank 8, Fisher-weighted", 8, weighted=True),
    Variant("rank 8, surrogate skip", 8, "surrogate"),
    Variant("rank 8, `aqsgd(4)\\|int4`", 8, codec="aqsgd(4)|int4"),
    Variant("rank 8, surrogate skip, `aqsgd(4)\\|int4`", 8, "surrogate", codec="aqsgd(4)|int4"),
    Variant("rank 8, `int4`", 8, codec="int4"),
)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every row."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from workloads import Block

    from merak_like.runtime.codecs import Context, codec
    from merak_like.runtime.codecs.loopback import Loopback
    from merak_like.split.low_rank import fisher_information
    from merak_like.split.sft import sft

    torch.set_num_threads(1)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    samples = ids[: len(ids) // (SEQUENCE + 1) * (SEQUENCE + 1)].view(-1, SEQUENCE + 1)
    before, after = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    order = torch.randperm(len(after), generator=torch.Generator().manual_seed(0))
    tuned, held_out = after[order[: args.samples]], after[order[args.samples : args.samples + 512]]

    class Letters(nn.Module):
        """Four blocks over letters."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = (
                nn.Embedding(len(letters), WIDTH),
                nn.Parameter(0.02 * torch.randn(SEQUENCE, WIDTH)),
            )
            self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(4))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(letters))

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            """The loss of the next letters."""
            x = self.token(ids[:, :-1]) + self.place
            for block in self.blocks:
                x = block(x)
            return {"loss": F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())}

    def steps(model: nn.Module, data: Tensor, count: int, rate: float, seed: int, link: Loopback | None) -> None:
        shuffle = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), rate)
        done = 0
        while done < count:
            for chosen in torch.randperm(len(data), generator=shuffle).split(BATCH)[: count - done]:
                if link is not None:
                    setattr(model, "now", Context(step=done, samples=tuple(chosen.tolist())))  # noqa: B010
                loss = model(data[chosen])["loss"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                done += 1

    def tested(model: nn.Module) -> float:
        with torch.no_grad():
            losses = [model(part)["loss"].item() for part in held_out.split(BATCH)]
        return statistics.mean(losses)

    torch.manual_seed(0)
    trained = Letters()
    steps(trained, before, args.first_steps, 1e-3, 0, None)
    fisher = fisher_information(
        trained, [f"{LAYER}.ffn.0.weight"], tuned[:256].split(4), lambda model, batch: model(batch)["loss"]
    )
    rows: dict[str, Any] = {}
    start = tested(trained)
    for variant in VARIANTS:
        losses: list[float] = []
        ratio = 1.0
        for seed in range(args.seeds):
            model, link = copy.deepcopy(trained), None
            if variant.rank is not None:
                sft(
                    model, {"ids": tuned[:BATCH]}, LAYER, variant.rank, skip=variant.skip,
                    fisher=fisher if variant.weighted else None,
                )  # fmt: skip
                link = Loopback(codec(variant.codec), codec(variant.codec))

                def through(module: nn.Module, ins: Any, z: Tensor, model: Any = model, link: Any = link) -> Tensor:
                    return link(z, model.now) if model.training else z

                model.get_submodule(f"{LAYER}.wire.s").register_forward_hook(through)
            steps(model.train(), tuned, args.steps, 3e-4, seed, link)
            losses.append(tested(model.eval()))
            if link is not None:
                ratio = 2 * 4 * WIDTH * SEQUENCE * BATCH * args.steps / sum(link.sent.values())
        rows[variant.name] = {
            "ratio": ratio, "loss": statistics.mean(losses), "lowest": min(losses), "highest": max(losses),
        }  # fmt: skip
        print(variant.name, rows[variant.name], flush=True)
    setting = {
        "width": WIDTH, "layers": 4, "letters of a sample": SEQUENCE, "samples": args.samples,
        "steps before": args.first_steps, "steps of fine-tuning": args.steps, "seeds": args.seeds,
        "torch": torch.__version__,
    }  # fmt: skip
    return {"setting": setting, "before": start, "rows": rows}


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| fine-tuned | times less, both ways | loss of unseen text | to not cut |", "|---|---:|---|---:|"]
    whole = data["rows"]["not cut"]["loss"]
    lines.append(f"| not at all | | {data['before']:.3f} | {data['before'] - whole:+.3f} |")
    for name, row in data["rows"].items():
        spread = f"{row['loss']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
        ratio = "" if name == "not cut" else f"{row['ratio']:.1f}"
        lines.append(f"| {name} | {ratio} | {spread} | {row['loss'] - whole:+.3f} |")
    setting = "Setting: " + ", ".join(f"{key} {value}" for key, value in data["setting"].items()) + "."
    return "\n".join([*lines, "", setting])


def main() -> int:
    """Measure, or only fill the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--first-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only fill the README's table")
    parser.add_argument("--check", action="store_true", help="with --table: only say whether it is up to date")
    args = parser.parse_args()
    if not args.table:
        (HERE / "sft.json").write_text(json.dumps(measure(args), indent=1) + "\n", encoding="utf-8")
    return fill("sft", table(json.loads((HERE / "sft.json").read_text(encoding="utf-8"))), args.check)


if __name__ == "__main__":
    sys.exit(main())
