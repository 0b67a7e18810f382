"""Compress: bytes, errors, seconds and memory of a step with packed inputs, and what a training then comes to."""

from __future__ import annotations

from typing import Any

import small
from measure import cpu, peak

Lines = list[list[str]]

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
        with Peak(space["batch"].values(), least=2**20) as found:
            engine.step(space["batch"])
        return found.most

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
    first = "e.step({k: v[:1024] for k, v in batch.items()})\n# --\ne.step(batch)"
    taken = [
        peak(f"{DEEP}\ne = engine([{some}])\n{first}", MALLOC_MMAP_THRESHOLD_=str(2**20))
        for some in ("", "Compress(0.02, adapt=False)")
    ]
    more = f"{where}, 8,192 rows, a process"
    adds = "bound 0.02: resident memory that a step adds"
    lines += [
        [more, f"{adds}, down by", "40 %", f"{1 - taken[1] / taken[0]:.0%}"],
        [more, f"{adds}, MB: plain, packed", "", " ".join(f"{n / 1e6:.0f}" for n in taken)],
    ]
    return lines + coding()


def coding() -> Lines:
    """What it takes to pack a tensor and to read it, as the planner counts it (``planned_bytes.coder``)."""
    import torch

    from merak_like.partitioner.this_machine import this_machine
    from merak_like.runtime.methods.planned_bytes import PACK_KERNELS, UNPACK_KERNELS
    from merak_like.runtime.methods.quantiser import SLICE, quantise

    machine = this_machine()
    torch.manual_seed(0)
    x = torch.randn(2**21)
    bound, lines = 0.01 * 2.5 * float(x.square().mean().sqrt()), []
    for entropy, name in ((False, "bound 0.01"), (True, "bound 0.01 and Huffman")):
        packed = quantise(x, bound, entropy=entropy)
        assert packed is not None
        both = (lambda e=entropy: quantise(x, bound, entropy=e)), packed.tensor
        each = [cpu(work, 9) / x.numel() for work in both]
        own = [
            s - k * machine.launch_seconds / SLICE for s, k in zip(each, (PACK_KERNELS, UNPACK_KERNELS), strict=True)
        ]
        moved = " ".join(f"{s * machine.memory_bandwidth:.0f}" for s in own)
        times = " ".join(f"{s * 1e9 / x.element_size():.1f}" for s in each)
        where = "2,097,152 normal numbers"
        lines += [
            [where, f"{name}: nanoseconds a byte: packing, reading", "", times],
            [where, f"{name}: bytes that could be moved while a number is packed, read", "", moved],
        ]
    return lines


def digits() -> Lines:
    """A small convolutional network on digits, with packed inputs and without."""
    accuracy = {kind: [_accuracy(kind, seed) for seed in range(3)] for kind in ("plain", "0.02", "adapted")}
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


def _accuracy(kind: str, seed: int, epochs: int = 4) -> float:
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
