"""``merak perplexity MODEL DATA``: how well a causal language model predicts some texts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a folder of save_pretrained.")],
    data: Annotated[str, typer.Argument(help="Texts: a file, a folder, or a pattern.")],
    seq: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder; default: the model's.")] = None,
    text: Annotated[str, typer.Option(help="The field of a record that holds the text.")] = "text",
    dp: Annotated[int, typer.Option(help="Replicas; start it with torchrun.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages; start it with torchrun.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks; start it with torchrun.")] = 1,
) -> None:
    """Print the mean loss per token, documents kept apart, and its exponential."""
    from merak_like.api import auto_parallel
    from merak_like.cli.export import weights
    from merak_like.cli.train import quiet
    from merak_like.hf import pretrained
    from merak_like.hf import text as texts
    from merak_like.trainer.config import Data
    from merak_like.trainer.data.build import datasets
    from merak_like.trainer.evaluation import evaluated

    quiet()
    with weights(model) as (folder, _), tempfile.TemporaryDirectory() as cache:
        asked = Data(train=data, seq=seq, text=text)
        read = datasets(
            asked, lambda: texts.tokenizer(tokenizer or folder), seed=0, cache=Path(cache), lead=True, timeout=600.0
        )
        rows = read.train
        collate = getattr(rows, "collate")  # noqa: B009  # both kinds of packed data have one
        loaded = pretrained.load(folder, {}, task="causal-lm")
        example = collate([rows[i % len(rows)] for i in range(batch)])
        engine = auto_parallel(
            loaded.model, dp, pp, tp, example=example, weights=loaded.weights, hardware="a100-80gb"
        )  # fmt: skip
        numbers = evaluated(engine, rows, collate, batch)
    if engine.world.rank == 0:
        typer.echo(f"loss {numbers['eval_loss']:.4f} nats per token, perplexity {numbers['eval_perplexity']:.3f}")
    engine.close()
