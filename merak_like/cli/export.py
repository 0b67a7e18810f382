"""``merak export RUN``: what was trained as a Hugging Face folder that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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
    from merak_like.runtime.initialize import rank

    quiet()
    if rank():  # one process writes, however many torchrun started
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is already there: name a folder that is new or empty")
    with weights(source) as (folder, where):
        count = export(folder, output, base=base or _base(source), dtype=dtype, shard=shard)
    typer.echo(f"wrote {count:,} parameters of {where} to {output}")


@contextmanager
def weights(source: Path) -> Iterator[tuple[Path, Path]]:
    """A folder with the weights that a run, or a checkpoint, means, and where they are from.

    The final model, else those of the newest checkpoint: each process writes them to a folder of its own, which is
    there for the block.
    """
    from merak_like.runtime.checkpoint.folder import candidates
    from merak_like.trainer.checkpoints import within

    for folder in (source, source / "model"):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            yield folder, folder
            return
    found = candidates(within(source))
    if not found:
        raise ValueError(f"{source} has no weights, and neither have its model/ and checkpoints/")
    from merak_like.trainer.run import weights_of

    with TemporaryDirectory() as name:
        weights_of(found[0], Path(name) / "model")
        yield Path(name) / "model", found[0]


def _base(source: Path) -> Path | None:
    """Where the run started from."""
    for folder in (source, source.parent, source.parent.parent):
        file = folder / "config.resolved.yaml"
        if file.is_file():
            from merak_like.trainer.config import load

            return load(file).model.path
    return None
