"""``merak export RUN``: what was trained as a Hugging Face folder that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    base: Annotated[
        Path | None, typer.Option(help="The model that a LoRA adapter is for; default: the run's model.path.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, such as bfloat16; default: as trained.")] = None,
    shard: Annotated[str, typer.Option(help="The largest file.")] = "5GB",
) -> None:
    """Write safetensors with their index, config, generation config and tokenizer; an adapter is merged first."""
    from merak_like.cli.train import quiet
    from merak_like.hf.export import export

    quiet()
    folder = chosen(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is already there: name a folder that is new or empty")
    count = export(folder, output, base=base or _base(source), dtype=dtype, shard=shard)
    typer.echo(f"wrote {count:,} parameters of {folder} to {output}")


def chosen(source: Path) -> Path:
    """The folder with weights that a run, or a checkpoint, means: the final model, else the newest checkpoint."""
    from merak_like.trainer.checkpoints import Weights

    newest = Weights().latest(source / "checkpoints")
    for folder in (source, source / "model", *([newest] if newest else [])):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    raise ValueError(f"{source} has no weights, and neither have its model/ and checkpoints/")


def _base(source: Path) -> Path | None:
    """Where the run started from."""
    for folder in (source, source.parent, source.parent.parent):
        file = folder / "config.resolved.yaml"
        if file.is_file():
            from merak_like.trainer.config import load

            return load(file).model.path
    return None
