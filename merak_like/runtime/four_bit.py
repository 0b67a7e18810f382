"""Linear layers whose frozen weights have four bits a number, by bitsandbytes (Dettmers et al., "QLoRA", NeurIPS 2023).

    weight   two numbers in a byte, each one of sixteen levels
    scales   for each 64 numbers in a row the largest of them

A product first makes the numbers again and forgets them after; so does its backward. Both are plain tensors of the
module, so a rank holds, moves and saves those of its own stages as any others.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
"""Numbers that share a scale: the least that bitsandbytes offers, and QLoRA's choice (section 3)."""
KINDS = ("nf4", "fp4")


def library() -> Any:
    """bitsandbytes' functions. Raises ValueError where it is not installed."""
    try:
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"4-bit weights need bitsandbytes, but {error}: pip install 'merak-like[four-bit]'") from None
    return functional


class FourBit(nn.Linear):
    """``nn.Linear`` with a frozen weight of four bits a number; its bias stays as it is, and frozen too."""

    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        packed, state = library().quantize_4bit(
            linear.weight.detach().contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=False
        )  # fmt: skip
        self.kind = kind
        self.weight = nn.Parameter(packed, requires_grad=False)
        # as integers: a model that is cast to another precision must not round its scales
        self.register_buffer("scales", state.absmax.float().view(torch.int32))
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """The product, in the precision of ``input``, or of autocast."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            made = _Product.apply(input.to(dtype), self.weight, self.scales, self)
            return made if self.bias is None else made + self.bias.to(dtype)

    def whole(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's numbers, [out, in]."""
        functional = library()
        known = torch.float32 if dtype == torch.float64 else dtype
        state = functional.QuantState(
            absmax=scales.view(torch.float32), shape=torch.Size((self.out_features, self.in_features)),
            code=functional.get_4bit_type(self.kind, device=scales.device), blocksize=BLOCK, quant_type=self.kind,
            dtype=known,
        )  # fmt: skip
        return functional.dequantize_4bit(weight, state).to(dtype)

    def extra_repr(self) -> str:
        """For people."""
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """``input @ weight.T`` that keeps the four bits and not the numbers for its backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        input, weight, scales, layer = args
        ctx.save_for_backward(weight, scales)
        ctx.layer = layer
        return F.linear(input, layer.whole(weight, scales, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scales = ctx.saved_tensors
        return gradients[0] @ ctx.layer.whole(weight, scales, gradients[0].dtype), None, None, None


def quantise(model: nn.Module, kind: str) -> int:
    """Turn the linear layers of a model, in place, into layers of four bits; how many there were.

    Whole stay the output layer and weights that have another reader. Raises ValueError for a model that has none left,
    or is not there yet (on the meta device).
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of 4-bit weights {kind!r}: there are {', '.join(KINDS)}")
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and owners[id(module.weight)] == 1
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer of its own to keep in four bits: leave base out")
    for name, module in found:
        if module.weight.is_meta:
            raise ValueError(f"{name} has no weights to keep in four bits: load the model first")
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, FourBit(module, kind))
    return len(found)


def refuse(model: nn.Module, tp: int, zero: int) -> None:
    """Raise ValueError for layouts that quantised weights cannot have, and for layers that keep theirs out of sight."""
    for name, module in model.named_modules():
        foreign = type(module).__module__.startswith("bitsandbytes")
        if foreign:
            raise ValueError(
                f"{name} is a {type(module).__name__} of bitsandbytes, whose scales no rank could move or save: load "
                "the model in full and let lora.base (merak_like.runtime.four_bit.quantise) keep it in four bits"
            )
        if isinstance(module, FourBit) and (tp > 1 or zero == 3):
            asked = f"tp={tp}" if tp > 1 else "zero=3"
            raise ValueError(
                f"{name} has 4-bit weights, whose scales belong to runs of {BLOCK} numbers: {asked} would cut through "
                "them; use pp, dp and zero up to 2, or weights in full"
            )
