"""The rows of the table: each measures one method and says what it found beside its bar, as JSON on the last line."""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import curvature  # noqa: E402
import edges  # noqa: E402
import small  # noqa: E402

Lines = list[list[str]]


def cpu(work: Callable[[], Any], turns: int = 15) -> float:
    """CPU seconds of one call, the middle of some."""
    found = []
    for _ in range(turns):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def resident() -> int:
    """Bytes of this process now."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def peak(work: str) -> int:
    """Bytes that a piece of Python adds at its most: ``prepare`` ends with the mark, what follows is counted."""
    prepare, _, rest = work.partition("# --\n")
    code = f"""
import resource, sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
import rows, torch
torch.set_num_threads(1)
{prepare}
before = rows.resident()
{rest}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    return int(run.stdout.split()[-1])


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


DEEP = """
import torch.nn as nn, torch.nn.functional as F
from merak_like import auto_parallel
from merak_like.runtime.methods.compress import Compress
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(256, 256), nn.ReLU())))
        self.head = nn.Linear(256, 10)
    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.body(x)), labels)
torch.manual_seed(0)
batch = {"x": torch.randn(8192, 256), "labels": torch.randint(10, (8192,))}
def engine(methods):
    return auto_parallel(Deep(), example=batch, hardware="a100-80gb", device="cpu", methods=methods,
                         optimizer=lambda p: torch.optim.SGD(p, 0.01))
"""


def compress() -> Lines:
    """A 12-layer MLP's memory, of its tensors: a process's depends on what else the machine does."""
    import torch

    from tests.peaks import Peak

    torch.set_num_threads(1)
    space: dict[str, Any] = {}
    exec("import torch\n" + DEEP, space)

    def alive(*methods: Any) -> int:
        engine = space["engine"](methods)
        with Peak(space["batch"].values(), least=2**20) as peak:
            engine.step(space["batch"])
        return peak.most

    plain, ours = alive(), alive(space["Compress"](0.02, adapt=False))
    some = {k: v[:1024] for k, v in space["batch"].items()}

    def gradients(*methods: Any) -> tuple[dict[str, torch.Tensor], float]:
        torch.manual_seed(0)
        engine = space["engine"](methods)
        engine.step(some)
        found = {name: g.clone() for name, g in engine.full_gradients().items()}
        return found, cpu(lambda: engine.step(some), 3)

    exact, plainly = gradients()
    lines: Lines = []
    where = "12 layers of 256 with ReLU"
    for bound, entropy in ((0.01, False), (0.02, False), (0.03, True)):
        method = space["Compress"](bound, entropy=entropy, adapt=False)
        found, seconds = gradients(method)
        off = max(float((found[n] - g).norm() / g.norm()) for n, g in exact.items() if g.ndim > 1)
        before, after = method.counted
        coder = " and Huffman" if entropy else ""
        lines += [
            [where, f"bound {bound}{coder}: fewer bytes kept", "8 x" if entropy else "4 x", f"{before / after:.1f} x"],
            [where, f"bound {bound}{coder}: relative gradient error", f"{2 * bound:.2f}", f"{off:.4f}"],
            [where, f"bound {bound}{coder}: time of a step to plain", "", f"{seconds / plainly:.1f}"],
        ]
    lines.append(
        [
            f"{where}, 8,192 rows",
            "bound 0.02: most bytes of tensors in a step, down by",
            "40 %",
            f"{1 - ours / plain:.0%}",
        ]
    )
    return lines


def compress_digits() -> Lines:
    """A small convolutional network on digits, with packed inputs and without."""
    accuracy = {kind: [_digits(kind, seed) for seed in range(3)] for kind in ("plain", "0.02", "adapted")}
    means = {kind: sum(found) / 3 for kind, found in accuracy.items()}
    where = "digits, two convolutions, 4 epochs, 3 seeds"
    return [
        [
            where,
            f"bound {kind}: accuracy less than {means['plain']:.3f} by",
            "0.010",
            f"{means['plain'] - means[kind]:.3f}",
        ]
        for kind in ("0.02", "adapted")
    ]


def _digits(kind: str, seed: int, epochs: int = 4) -> float:
    """Accuracy on 360 held-out digits after training a small convolutional network with packed inputs."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from merak_like import auto_parallel
    from merak_like.runtime.methods.compress import Compress

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(1024, 10)

        def logits(self, x: Any) -> Any:
            return self.head(F.relu(self.two(F.relu(self.one(x.view(-1, 1, 8, 8))))).flatten(1))

        def forward(self, x: Any, labels: Any) -> Any:
            return F.cross_entropy(self.logits(x), labels)

    x, y = small.digits()
    torch.manual_seed(seed)
    model = Net()
    methods = [] if kind == "plain" else [Compress(0.02, adapt=kind == "adapted")]
    shuffle = torch.Generator().manual_seed(seed)
    batches = [c for _ in range(epochs) for c in torch.randperm(1437, generator=shuffle).split(64)[:-1]]
    engine = auto_parallel(
        model, example={"x": x[:64], "labels": y[:64]}, hardware="a100-80gb", device="cpu", methods=methods,
        optimizer=lambda p: torch.optim.Adam(p, 1e-3),
    )  # fmt: skip
    for chosen in batches:
        engine.step({"x": x[chosen], "labels": y[chosen]})
    with torch.no_grad():
        return float((model.logits(x[1437:]).argmax(1) == y[1437:]).double().mean())


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
    "compress": Row("Compress", compress),
    "compress_digits": Row("Compress", compress_digits),
    "kfac": Row("Kfac", curvature.kfac),
    "experts": Row("MatrixProductExperts", small.experts),
    "low_rank": Row("LowRank", small.low_rank),
    "element_weights": Row("factor_elements", small.element_weights),
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
