"""What one device and its links can do, by name: the figures every estimate starts from.

Peaks are the maker's dense figures (2:4 sparsity would double them, and no training uses it). V100, A100: NVIDIA V100
(SXM2) and A100 (SXM4) datasheets. H100, H200, B200, L40S: NVIDIA H100 and H200 (SXM5), HGX B200 and L40S datasheets
(these print the sparse figures, twice the dense). MI300X: AMD Instinct MI300X datasheet. RTX 3090, 4090: NVIDIA Ampere
GA102 and NVIDIA Ada GPU architecture whitepapers (tensor peaks with FP32 accumulation). float32 is without TF32, which
torch leaves off by default. "80 GB" is taken as 80e9 bytes: devices have a few percent more, which the driver's context
uses up.

Not from datasheets: the constants that are fitted or measured (below), and, assumed, other latencies and the network
between nodes (one 200 or 400 Gb/s adapter for each data-centre GPU, 25 Gb/s Ethernet for a workstation). Measure your
own with ``this_machine``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil, log2
from typing import Any, cast

from merak_like.partitioner.graph import Collective
from merak_like.partitioner.schedules.action import unknown


@dataclass(frozen=True, slots=True)
class Link:
    """A way from one device to another."""

    bandwidth: float
    """Bytes per second in one direction."""
    latency: float
    """Seconds before the first byte arrives."""

    def seconds(self, nbytes: float) -> float:
        """Seconds to move some bytes; no bytes, no transfer."""
        return self.latency + nbytes / self.bandwidth if nbytes > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, and its links to others. All ranks are taken to be alike."""

    name: str
    peak_flops: Mapping[str, float]
    """Floating-point operations per second of a matmul, by torch's name of the dtype; must have ``float32``."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes per second."""
    intra: Link
    """Between two devices of one node."""
    inter: Link
    """Between two nodes, for each device."""
    devices_per_node: int
    efficiency: float = 0.75
    """Share of the peak that a very large matmul reaches."""
    half_flops: float = 1e9
    """Flops of the float32 matmul that reaches half of that share, if the smallest reach nothing: small ones do not
    fill the device. Those of another dtype lose as much time."""
    least_share: float = 0.0
    """Of ``efficiency``: what the smallest matmuls reach. Below that is only the start of the kernel."""
    launch_seconds: float = 5e-6
    """Seconds each torch function costs, however small: the CPU has to start it."""
    memory_efficiency: float = 1.0
    """Share of the memory bandwidth that kernels reach."""
    intra_efficiency: float = 1.0
    inter_efficiency: float = 1.0
    """Shares of the links' bandwidths that collectives reach."""
    devices_per_adapter: int = 1
    """Devices of a node that share a network adapter; ``inter`` is the part of each."""
    step_seconds: float = 0.0
    """What each step costs besides: reading the batch, the host, stragglers."""
    micro_batch_seconds: float = 0.0
    message_seconds: float = 0.0
    collective_seconds: float = 0.0
    """What the host spends on each micro-batch of a step before it runs, on starting or taking a transfer, and on a
    sum over ranks; of the last, also waiting for the slowest of them."""
    backward_factor: float = 1.0
    """How many times its estimate a backward takes: autograd's own work, and gradients that are added up."""
    state_bandwidth: float = 0.0
    """Bytes per second of what an optimizer keeps, which is never in a cache, as it steps; 0: as of all memory."""
    queued: bool = False
    """Whether kernels are started while others run: then a call takes the longer of the two, not the sum."""
    kernels: str = "torch"
    attention: str = "flash"
    """The software that is taken to run on it; see ``software``."""
    overlap: bool = False
    """Whether it hides communication: gradients are reduced over replicas behind the last backward (and with ZeRO
    weights gathered behind the first forward), sequence-parallel gathers and scatters run in parts behind matmuls."""
    usable_memory: float = 0.92
    """Share of the memory that tensors may fill; the rest goes to the allocator's holes and communication buffers."""
    source: str = ""
    """Where the figures come from."""

    def __post_init__(self) -> None:
        amounts = {
            "memory_bytes": self.memory_bytes, "memory_bandwidth": self.memory_bandwidth, "efficiency": self.efficiency,
            "intra bandwidth": self.intra.bandwidth, "inter bandwidth": self.inter.bandwidth,
            "devices_per_node": self.devices_per_node, "usable_memory": self.usable_memory,
            **{f"peak_flops of {dtype}": peak for dtype, peak in self.peak_flops.items()},
        }  # fmt: skip
        for what, amount in amounts.items():
            if not amount > 0:
                raise ValueError(f"hardware {self.name!r}: {what} is {amount!r}, but it must be above 0")
        if "float32" not in self.peak_flops:
            raise ValueError(f"hardware {self.name!r}: peak_flops lacks float32, it has {sorted(self.peak_flops)}")

    def matmul_seconds(self, flops: float, dtype: str) -> float:
        """Seconds of one matmul; a dtype without a peak of its own runs as float32.

        The efficiency grows from ``least_share`` of it: of float32, with ``least = half * share / (1 - share)``, it is
        ``efficiency * (flops + least) / (flops + least + half)``.
        """
        if flops <= 0:
            return 0.0
        alone, half = flops / self.peak(dtype), self.half_flops / self.peak("float32")
        least = half * self.least_share / (1 - self.least_share)
        return (alone + half * alone / (alone + least)) / self.efficiency

    def peak(self, dtype: str) -> float:
        """Floating-point operations per second; a dtype without a figure of its own runs as float32."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])

    def link(self, first_rank: int, second_rank: int) -> Link:
        """The link between two global ranks: nodes hold ``devices_per_node`` consecutive ranks."""
        same = first_rank // self.devices_per_node == second_rank // self.devices_per_node
        return self.intra if same else self.inter

    def streaming_seconds(self, nbytes: float) -> float:
        """Seconds to read or write so many bytes of the device's memory."""
        return nbytes / (self.memory_bandwidth * self.memory_efficiency)

    def stepping_seconds(self, nbytes: float) -> float:
        """Seconds to step through so many bytes of gradients, weights and the optimizer's state."""
        return nbytes / self.state_bandwidth if self.state_bandwidth else self.streaming_seconds(nbytes)

    def group_link(self, ranks: int, stride: int = 1) -> Link:
        """What a ring over ``ranks`` ranks, ``stride`` apart, gets of the links: those of a node share its adapters.

        Where devices share an adapter, the rings of several groups with several devices of a node meet on some and
        leave others idle; one device's ring, or that of all, does not (vTrain's rows in ``benchmarks/planner``).
        """
        inside = min(max(self.devices_per_node // stride, 1), ranks)
        within = self.intra.bandwidth * self.intra_efficiency
        if inside == ranks:
            return Link(within, self.intra.latency)
        meeting = self.devices_per_adapter if 1 < inside < self.devices_per_node else 1
        between = self.inter.bandwidth * inside * self.inter_efficiency / meeting
        return Link(min(between, within), self.inter.latency)

    def exposed_seconds(self, sum_: Collective, scale: float, dtype: str) -> float:
        """Seconds that a sum over tensor-parallel ranks adds to a call; of one that is hidden, its first two parts.

        Fused kernels sum (or scatter, half a sum) the gradient of an input while they compute that of the weight, as
        Megatron-LM's column-parallel layers do. Rows are gathered again in the backward, for the gradient of a weight:
        half a sum. Fused kernels hide that under the gradient of the input (Korthikanti et al. 2022, sec. 4.2.2),
        torch's do not.
        """
        seconds, fused = self.all_reduce_seconds(sum_.nbytes * scale, sum_.degree), self.kernels == "fused"
        shown = seconds * (min(1.0, 2 / sum_.degree) if self.overlap and sum_.parted else 1.0)
        beside = self.matmul_seconds(sum_.beside * scale, dtype) if fused else 0.0
        again = 0.5 * seconds * (sum_.parted and sum_.backward and not fused)
        return shown - min(shown / 2 if sum_.parted else shown, beside) + again

    def all_reduce_seconds(self, nbytes: float, ranks: int, stride: int = 1) -> float:
        """Seconds of an all-reduce of so many bytes on each rank (alpha-beta: Thakur et al. 2005, sec. 4.5).

        The bytes go round a ring; the latencies are those of trees, one over the nodes and one inside each.
        """
        if ranks == 1 or not nbytes:
            return 0.0
        inside = min(max(self.devices_per_node // stride, 1), ranks)
        latency = ceil(log2(inside)) * self.intra.latency + ceil(log2(ranks / inside)) * self.inter.latency
        moved = 2 * (ranks - 1) / ranks * nbytes
        return self.collective_seconds + 2 * latency + moved / self.group_link(ranks, stride).bandwidth

    @property
    def memory_limit(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory_bytes * self.usable_memory)

    def to_json(self) -> str:
        """The figures as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Read what ``to_json`` wrote; ValueError for a missing or unknown field."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not hardware: {error}") from None
        made = _checked(cls, data, "hardware")
        for name in ("intra", "inter"):
            made[name] = Link(**_checked(Link, made[name], name))
        return cls(**made)


def _checked(kind: Any, data: Any, where: str) -> dict[str, Any]:
    known = [f.name for f in fields(kind)]
    found = cast(dict[str, Any], data) if isinstance(data, dict) else {}
    if set(found) != set(known):
        raise ValueError(f"{where} must be a JSON object with exactly the fields {known}, not {sorted(found)}")
    return dict(found)


MATMUL_EFFICIENCY = 0.679
MATMUL_SECONDS = 6e-5
MEMORY_EFFICIENCY = 0.95
LAUNCH_SECONDS = 3e-6
INTER_EFFICIENCY = 0.869
"""Fitted together, for all GPUs alike, to every other row of the published times in ``benchmarks/planner``; its README
has the errors on the other half. A large matmul takes ``MATMUL_SECONDS`` of the peak's time longer than its flops do;
the host needs ``LAUNCH_SECONDS`` to start a kernel, while others run."""
LEAST_SHARE = 0.2
"""Assumed: published steps have no small matmuls."""
INTRA_EFFICIENCY = 0.72
"""Measured: what NCCL's all-reduce reaches on 8 and on 4 A100 with messages of 0.1 to 1 GB, in the table of vTrain's
authors (Bang et al. 2024, github.com/VIA-Research/vTrain, ``trace/a100``); on 2 it is 0.6. So is the latency of NVLink
below: on 2, 4, 8 devices the smallest message takes about 40, 50 and 90 us."""


def _gpu(
    name: str, peaks: Mapping[str, float], memory: float, bandwidth: float, intra: Link, inter: Link, source: str,
    *, newer: bool = True,
) -> Hardware:  # fmt: skip
    """A GPU with the maker's figures and the constants above; ``newer`` than flash attention and hidden reductions."""
    return Hardware(
        name, peaks, int(memory), bandwidth, intra, inter, 8,
        efficiency=MATMUL_EFFICIENCY, half_flops=MATMUL_SECONDS * peaks["float32"], least_share=LEAST_SHARE,
        launch_seconds=LAUNCH_SECONDS, memory_efficiency=MEMORY_EFFICIENCY, intra_efficiency=INTRA_EFFICIENCY,
        inter_efficiency=INTER_EFFICIENCY, queued=True, kernels="fused", attention="flash" if newer else "math",
        overlap=newer, source=source,
    )  # fmt: skip


_NVLINK2, _NVLINK3, _NVLINK4, _NVLINK5 = (Link(speed, 10e-6) for speed in (150e9, 300e9, 450e9, 900e9))
_XGMI, _PCIE4 = Link(448e9, 5e-6), Link(32e9, 15e-6)
_EDR, _HDR, _NDR, _ETHERNET = Link(12.5e9, 10e-6), Link(25e9, 10e-6), Link(50e9, 10e-6), Link(3.125e9, 50e-6)
_VOLTA = {"float64": 7.8e12, "float32": 15.7e12, "float16": 125e12}
_AMPERE = {"float64": 9.7e12, "float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12}
_HOPPER = {
    "float64": 34e12, "float32": 67e12, "float16": 989.4e12, "bfloat16": 989.4e12,
    "float8_e4m3fn": 1978.9e12, "float8_e5m2": 1978.9e12,
}  # fmt: skip
_BLACKWELL = {
    "float64": 37e12, "float32": 75e12, "float16": 2250e12, "bfloat16": 2250e12, "float8_e4m3fn": 4500e12,
    "float8_e5m2": 4500e12,
}  # fmt: skip
_CDNA3 = {
    "float64": 81.7e12, "float32": 163.4e12, "float16": 1307.4e12, "bfloat16": 1307.4e12,
    "float8_e4m3fn": 2614.9e12, "float8_e5m2": 2614.9e12,
}  # fmt: skip
_GA102 = {"float64": 0.556e12, "float32": 35.6e12, "float16": 71.2e12, "bfloat16": 71.2e12}
_L40S = {
    "float64": 1.43e12, "float32": 91.6e12, "float16": 362.05e12, "bfloat16": 362.05e12,
    "float8_e4m3fn": 733e12, "float8_e5m2": 733e12,
}  # fmt: skip
_AD102 = {
    "float64": 1.29e12, "float32": 82.6e12, "float16": 165.2e12, "bfloat16": 165.2e12,
    "float8_e4m3fn": 330.3e12, "float8_e5m2": 330.3e12,
}  # fmt: skip

PRESETS: Mapping[str, Hardware] = {
    h.name: h
    for h in (
        _gpu("v100-16gb", _VOLTA, 16e9, 0.9e12, _NVLINK2, _EDR, "NVIDIA V100 SXM2 datasheet", newer=False),
        _gpu("v100-32gb", _VOLTA, 32e9, 0.9e12, _NVLINK2, _EDR, "NVIDIA V100 SXM2 datasheet", newer=False),
        _gpu("a100-40gb", _AMPERE, 40e9, 1.555e12, _NVLINK3, _HDR, "NVIDIA A100 SXM4 datasheet", newer=False),
        _gpu("a100-80gb", _AMPERE, 80e9, 2.039e12, _NVLINK3, _HDR, "NVIDIA A100 SXM4 datasheet", newer=False),
        _gpu("h100", _HOPPER, 80e9, 3.35e12, _NVLINK4, _NDR, "NVIDIA H100 SXM5 datasheet"),
        _gpu("h200", _HOPPER, 141e9, 4.8e12, _NVLINK4, _NDR, "NVIDIA H200 SXM5 datasheet"),
        _gpu("b200", _BLACKWELL, 180e9, 7.7e12, _NVLINK5, _NDR, "NVIDIA HGX B200 datasheet"),
        _gpu("mi300x", _CDNA3, 192e9, 5.3e12, _XGMI, _NDR, "AMD Instinct MI300X datasheet"),
        _gpu("l40s", _L40S, 48e9, 0.864e12, _PCIE4, _HDR, "NVIDIA L40S datasheet"),
        _gpu("rtx3090", _GA102, 24e9, 0.936e12, _PCIE4, _ETHERNET, "NVIDIA GA102 whitepaper"),
        _gpu("rtx4090", _AD102, 24e9, 1.008e12, _PCIE4, _ETHERNET, "NVIDIA Ada whitepaper"),
    )
}
"""Known devices by name."""
ALIASES: Mapping[str, str] = {
    "a100": "a100-80gb", "v100": "v100-32gb", "h100-80gb": "h100", "h200-141gb": "h200", "b200-180gb": "b200",
    "mi300x-192gb": "mi300x", "l40s-48gb": "l40s",
}  # fmt: skip


def hardware_named(name: str) -> Hardware:
    """The preset of that name; ValueError with the nearest name if there is none."""
    words = name.lower().replace("_", "-").replace(" ", "-").split("-")
    short = "-".join(word for word in words if word not in ("nvidia", "amd", "geforce", "sxm", "sxm2", "sxm4", "sxm5"))
    found = re.sub(r"(\d+)g$", r"\1gb", short)
    found = ALIASES.get(found, found)
    if found not in PRESETS:
        raise unknown("hardware", name, PRESETS)
    return PRESETS[found]
