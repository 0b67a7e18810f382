"""A folder of weights becomes one that is complete: loaded as users will load it, and written anew."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from merak_like.hf import _dtype, pretrained


def export(
    folder: Path, output: Path, *, base: Path | None = None, dtype: str | None = None, shard: str = "5GB"
) -> int:
    """Write the model in ``folder`` to ``output``; how many parameters it has.

    The additions of a LoRA adapter are merged into the weights of ``base``. Raises ValueError for an adapter without
    a base, and for weights that do not fill the model.
    """
    if (folder / "adapter_config.json").is_file():
        if base is None:
            raise ValueError(f"{folder} is a LoRA adapter: say --base, the model it was trained on")
        from merak_like.hf import lora

        with tempfile.TemporaryDirectory() as whole:
            lora.merge(base, folder, whole)
            return _write(Path(whole), folder, output, dtype, shard)
    return _write(folder, folder, output, dtype, shard)


def _write(folder: Path, beside: Path, output: Path, dtype: str | None, shard: str) -> int:
    model: Any = pretrained.load(folder, {}, whole=True).model.eval()
    if dtype is not None:
        model = model.to(_dtype(dtype))
    model.save_pretrained(output, max_shard_size=shard)
    if (beside / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(beside, local_files_only=True).save_pretrained(output)
    return sum(p.numel() for p in model.parameters())
