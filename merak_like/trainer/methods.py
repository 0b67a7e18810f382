"""From the ``methods`` of the settings to the parts that plug into the engine."""

from __future__ import annotations

from merak_like.runtime.methods.compiled import Compiled
from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.experts import CentralMask
from merak_like.runtime.methods.float8 import Float8
from merak_like.runtime.methods.head_loss import ChunkedLoss
from merak_like.runtime.methods.kfac import Kfac
from merak_like.runtime.methods.method import Method
from merak_like.runtime.methods.offload import Offload
from merak_like.runtime.methods.projection import LowRank
from merak_like.trainer.settings import Methods


def methods_of(asked: Methods) -> tuple[Method, ...]:
    """Those that are asked for, in the order in which they apply."""
    found: list[Method] = []
    if asked.chunked_loss:
        found.append(ChunkedLoss(kernel="liger" if asked.chunked_loss == "liger" else "own"))
    if asked.compile:
        found.append(Compiled())
    if asked.offload is not None:
        found.append(Offload(**asked.offload.model_dump()))
    if asked.float8 is not None:
        found.append(Float8(**asked.float8.model_dump()))
    if asked.compress is not None:
        found.append(Compress(**asked.compress.model_dump()))
    if asked.kfac is not None:
        found.append(Kfac(**asked.kfac.model_dump()))
    if asked.central_mask is not None:
        found.append(CentralMask(**asked.central_mask.model_dump()))
    if asked.low_rank is not None:
        found.append(LowRank(**asked.low_rank.model_dump()))
    return tuple(found)
