"""What MODEL means to ``serve`` and ``edge``: something both sides can build, and each can read its own weights of."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from merak_like.cli.models import FromConfig, source

if TYPE_CHECKING:
    from merak_like.split.half import Source


def half_source(text: str, *, task: str | None, weights: Path | None, seq: int | None = None) -> Source:
    """A folder with ``config.json`` and safetensors, or ``module:function`` returning (model, example[, loss_fn]).

    Weights may be a file of `merak edge train --powers`. Raises ValueError for neither.
    """
    from merak_like.split.half import Source

    weights = plain(weights)

    found = source(text, seq=seq, task=task, dtype=None)
    if isinstance(found, FromConfig):
        folder = found.folder if found.folder.is_dir() else found.folder.parent
        if weights is None and any(folder.glob("*.safetensors")):
            weights = folder
        return Source(lambda: found.load(1).model, weights)
    first = found.load(1)
    return Source(lambda: found.load(1).model, weights, first.loss_fn)


def plain(weights: Path | None) -> Path | None:
    """A file as safetensors knows it, of one that keeps weights as powers of two; gone when the process is."""
    if weights is None or not weights.is_file() or weights.suffix != ".safetensors":
        return weights
    from safetensors.torch import save_file

    from merak_like.runtime.methods import powers

    if not powers.kept_so(weights):
        return weights
    folder = tempfile.TemporaryDirectory(prefix="merak-")
    atexit.register(folder.cleanup)
    found = Path(folder.name) / weights.name
    save_file(powers.load(weights), found)
    return found
