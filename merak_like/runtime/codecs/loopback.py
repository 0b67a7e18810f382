"""A link whose two ends are in one process: what a codec does to training, without a network.

x --encode--> frame --decode--> x'   forward, counted
g' <--decode-- frame <--encode-- g   backward, counted
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from merak_like.runtime.codecs.codec import Codec, Context


class Loopback:
    """Call it on a tensor to send it from ``near`` to ``far``, two codecs made alike; gradients come back.

    ``sent`` counts the bytes of the frames, "forward" and "backward".
    """

    def __init__(self, near: Codec, far: Codec) -> None:
        if near is far or near.text != far.text:
            raise ValueError(f"a link has two ends with the same codec each: {near.text} and {far.text} given")
        self.near, self.far = near, far
        self.sent: Counter[str] = Counter()

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """What arrives at the far end, with a backward through the link."""
        context = replace(context or Context(), device=x.device)
        return _Through.apply(x, self, context)  # type: ignore[no-any-return]

    def carry(self, x: Tensor, context: Context) -> Tensor:
        """One transfer, in the context's direction."""
        sender, receiver = (self.near, self.far) if context.direction == "forward" else (self.far, self.near)
        frame = sender.encode(x, context)
        self.sent[context.direction] += frame.numel()
        return receiver.decode(frame, context)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, link: Loopback, context: Context) -> Tensor:
        ctx.link, ctx.context = link, context  # type: ignore[attr-defined]
        return link.carry(x, context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.carry(grads[0], replace(ctx.context, direction="backward")), None, None
