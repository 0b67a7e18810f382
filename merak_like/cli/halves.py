"""What MODEL means to ``serve`` and ``edge``: something both sides can build, and each can read its own weights of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merak_like.cli.models import FromConfig, source

if TYPE_CHECKING:
    from merak_like.split.half import Source


def half_source(text: str, *, task: str | None, weights: Path | None, seq: int | None = None) -> Source:
    """A folder with ``config.json`` and safetensors, or ``module:function`` returning (model, example[, loss_fn]).

    Raises ValueError for neither.
    """
    from merak_like.split.half import Source

    found = source(text, seq=seq, task=task, dtype=None)
    if isinstance(found, FromConfig):
        folder = found.folder if found.folder.is_dir() else found.folder.parent
        if weights is None and any(folder.glob("*.safetensors")):
            weights = folder
        return Source(lambda: found.load(1).model, weights)
    first = found.load(1)
    return Source(lambda: found.load(1).model, weights, first.loss_fn)
