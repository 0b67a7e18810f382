"""``torch.compile`` of what a stage runs: its ops become fused kernels (the idea of LightSeq2, Wang et al., SC 2022,
section 3.1, by today's compiler).

The first micro-batch of each shape waits for the compiler. Random numbers of a compiled dropout are others than those
of eager code, from the same seed; everything else is the same up to the order of sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from merak_like.runtime.methods.method import Job, Method
from merak_like.runtime.stage_code import Piece


class Compiled(Method):
    """Compiles every piece. ``options`` go to ``torch.compile``; shapes are static, as each has its own program."""

    compiles = True

    def __init__(self, **options: Any) -> None:
        self.options = {"dynamic": False, **options}

    def check(self, job: Job) -> None:
        """A W takes a linear layer apart as it is called, which compiled code does not do."""
        if job.waits:
            raise ValueError(f"compile does not go with {job.schedule}, whose W waits at each layer: use 1f1b or gpipe")

    def piece(self, piece: Piece) -> Piece:
        """Its code, compiled when it first runs."""
        return replace(piece, module=torch.compile(piece.module, **self.options))  # type: ignore[arg-type]
