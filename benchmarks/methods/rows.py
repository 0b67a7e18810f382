"""The rows of the table: each measures one method and says what it found beside its bar, as JSON on the last line."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import curvature  # noqa: E402
import edges  # noqa: E402
import packing  # noqa: E402
import small  # noqa: E402
import topics  # noqa: E402
from measure import cpu, peak  # noqa: E402

Lines = list[list[str]]


def flat_adamw() -> Lines:
    """One step over many small tensors."""
    import torch

    from merak_like.runtime.methods.flat_adamw import FlatAdamW

    torch.manual_seed(0)
    some = [torch.nn.Parameter(torch.randn(32, 32)) for _ in range(200)]
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": torch.optim.AdamW,
        "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "FlatAdamW": FlatAdamW,
        "FlatAdamW, fused": lambda p: FlatAdamW(p, fused=True),
    }
    took: dict[str, float] = {}
    ends: dict[str, list[torch.Tensor]] = {}
    for name, kind in kinds.items():
        own = copy.deepcopy(some)
        optimizer = kind(own)
        for step in range(3):
            torch.manual_seed(step)
            for parameter in own:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        ends[name] = [p.detach().clone() for p in own]
        took[name] = cpu(lambda optimizer=optimizer: [optimizer.step() for _ in range(5)]) / 5
    same = all(torch.equal(a, b) for a, b in zip(ends["AdamW"], ends["FlatAdamW"], strict=True))
    fused = all(torch.equal(a, b) for a, b in zip(ends["AdamW, fused"], ends["FlatAdamW, fused"], strict=True))
    where = "200 tensors of 32 x 32"
    return [
        [where, "bit-equal to AdamW, and fused to fused", "yes", "yes" if same and fused else "no"],
        [where, "time of a step to AdamW's", "0.70", f"{took['FlatAdamW'] / took['AdamW']:.2f}"],
        [where, "fused, to AdamW's with fused", "", f"{took['FlatAdamW, fused'] / took['AdamW, fused']:.2f}"],
        [where, "microseconds: " + ", ".join(took), "", " ".join(f"{1e6 * s:.0f}" for s in took.values())],
    ]


HEAD = """
import torch.nn.functional as F
from merak_like.runtime.methods.chunked_loss import linear_cross_entropy
torch.manual_seed(0)
x, w = torch.randn(2048, 256, requires_grad=True), (torch.randn(50000, 256) / 16).requires_grad_()
target = torch.randint(50000, (2048,))
F.cross_entropy(F.linear(x[:1], w[:2]), target[:1] % 2).backward()
x.grad = w.grad = None
# --
"""


def chunked_loss() -> Lines:
    """Output layer and loss of 2048 tokens and 50k words."""
    import torch
    import torch.nn.functional as F

    from merak_like.runtime.methods.chunked_loss import linear_cross_entropy

    torch.set_num_threads(1)
    naive = peak(HEAD + "F.cross_entropy(F.linear(x, w), target).backward()")
    ours = peak(HEAD + "linear_cross_entropy(x, w, None, target).backward()")
    torch.manual_seed(0)
    x, w = torch.randn(2048, 256, requires_grad=True), (torch.randn(50000, 256) / 16).requires_grad_()
    target = torch.randint(50000, (2048,))

    def step(loss: Callable[[], Any]) -> tuple[Any, ...]:
        return torch.autograd.grad(loss(), (x, w))

    both = (lambda: F.cross_entropy(F.linear(x, w), target)), (lambda: linear_cross_entropy(x, w, None, target))
    grads = [step(one) for one in both]
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*grads, strict=True))
    seconds = [cpu(lambda one=one: step(one), 1) for one in both]
    where = "2048 tokens, width 256, 50,000 words"
    return [
        [where, "peak memory to the plain loss's, gradients included", "25 %", f"{ours / naive:.0%}"],
        [where, "peak, MB: plain, chunked", "", f"{naive / 1e6:.0f} {ours / 1e6:.0f}"],
        [where, "largest difference of gradients", "1e-5", f"{off:.1e}"],
        [where, "time to the plain loss's", "", f"{seconds[1] / seconds[0]:.2f}"],
    ]


def compiled() -> Lines:
    """A transformer block, eager and through torch.compile."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    x = torch.randn(8, 64, 128)
    quick = torch.compile(block)

    def step(module: Any) -> Any:
        block.zero_grad()
        module(x).square().mean().backward()
        return [p.grad.clone() for p in block.parameters() if p.grad is not None]

    begin = time.process_time()
    made, plain = step(quick), step(block)
    first = time.process_time() - begin
    off = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-8)) for a, b in zip(made, plain, strict=True))
    seconds = [cpu(lambda m=m: step(m), 9) for m in (quick, block)]
    where = "transformer block of 128, 8 x 64 tokens"
    return [
        [where, "time of forward and backward to eager's", "", f"{seconds[0] / seconds[1]:.2f}"],
        [where, "largest difference of gradients", "", f"{off:.1e}"],
        [where, "CPU seconds of the first step", "", f"{first:.0f}"],
    ]


class Row(NamedTuple):
    """One method."""

    title: str
    measure: Callable[[], Lines]


ROWS = {
    "flat_adamw": Row("FlatAdamW", flat_adamw),
    "chunked_loss": Row("ChunkedLoss", chunked_loss),
    "compiled": Row("Compiled", compiled),
    "compress": Row("Compress", packing.compress),
    "compress_digits": Row("Compress", packing.digits),
    "kfac": Row("Kfac", curvature.kfac),
    "experts": Row("MatrixProductExperts", small.experts),
    "low_rank": Row("LowRank", small.low_rank),
    "element_weights": Row("factor_elements", small.element_weights),
    "topics": Row("factor_elements", topics.topics),
    "powers": Row("powers", small.powers),
    "binarised": Row("BinaryLinear, `sign`", small.binarised),
    "superposed": Row("`c3sl`", small.superposed),
    "adasplit": Row("AdaSplit", edges.adasplit),
    "generate": Row("text through hosts", edges.generate),
}

if __name__ == "__main__":
    print(
        json.dumps({"lines": ROWS[sys.argv[1]].measure(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )
