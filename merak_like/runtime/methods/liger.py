"""Cross-entropy of an output layer without its logits, by the kernels of Liger (Hsu et al., arXiv 2410.10989).

The same promise as ``chunked_loss.py``, in Triton on a GPU: gradients are made in the forward, chunk by chunk, so the
product with the weight is not done twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WHERE = ("cuda", "xpu")
"""Devices that Triton compiles for."""


def require() -> None:
    """Raise ValueError, saying what to install, where the library cannot be imported."""
    _loss_class()


def _loss_class() -> Any:
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError as error:
        raise ValueError(
            f"ChunkedLoss(kernel='liger') needs liger-kernel and Triton, but {error}: pip install 'merak-like[liger]', "
            "or leave kernel out"
        ) from None
    return LigerFusedLinearCrossEntropyLoss


def check(device: torch.device) -> None:
    """Raise ValueError for a device that the kernels do not run on."""
    if device.type not in WHERE:
        raise ValueError(f"Liger's kernels run on {' and '.join(WHERE)}, not on {device.type}: leave kernel out")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """As ``chunked_loss.linear_cross_entropy``; rows go through in chunks that Liger chooses."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        lower, dtype = torch.get_autocast_dtype(kind), torch.float32
        hidden, weight, bias = hidden.to(lower), weight.to(lower), None if bias is None else bias.to(lower)
    with torch.autocast(kind, enabled=False):
        loss = _loss_class()(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
        return loss(weight, hidden, target, bias).to(dtype or hidden.dtype)
