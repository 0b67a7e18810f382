"""Who spreads what the optimizer has over the replicas: us, DeepSpeed, or torch's ``fully_shard`` where weights are
spread too; and which of their combinations are exact."""

from __future__ import annotations

from dataclasses import dataclass

from merak_like.partitioner.mesh import Mesh

OWN = "own"
DEEPSPEED, OFFLOAD = "deepspeed", "deepspeed-offload"
BACKENDS = (OWN, DEEPSPEED, OFFLOAD)


@dataclass(frozen=True)
class Spreading:
    """A level of ZeRO and who does it."""

    zero: int = 0
    backend: str = OWN

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed's optimizer does it."""
        return self.backend != OWN

    @property
    def weights(self) -> bool:
        """Whether each replica has a share of the weights only."""
        return self.zero == 3

    @property
    def offload(self) -> bool:
        """Whether the optimizer's weights and state are in the CPU's memory."""
        return self.backend == OFFLOAD


def spreading_of(zero: int, backend: str | None, mesh: Mesh) -> Spreading:
    """What was asked for. Raises ValueError, with the nearest thing that works, for what is not exact or not there."""
    name = backend or OWN
    if name not in BACKENDS:
        raise ValueError(f"zero_backend={backend!r} is none of {', '.join(BACKENDS)}: leave it out for our own")
    if zero not in (0, 1, 2, 3):
        raise ValueError(
            f"zero={zero}: it is 0, 1 (spread the optimizer's state), 2 (gradients too) or 3 (weights too)"
        )
    if zero == 3 and name == OWN and mesh.pp * mesh.tp > 1:
        raise ValueError(
            f"zero=3 is torch's fully_shard, which works on calls of modules: not with pp={mesh.pp}, tp={mesh.tp} "
            f"but with dp={mesh.size}, pp=1, tp=1; use zero=2 with pp and tp, which divide the weights themselves"
        )
    if name != OWN and zero != 1:
        why = (
            "at level 0 it clips by the norm of one stage",
            "",
            f"DeepSpeed's level 2 sums gradients after each backward, which is wrong under a pipeline (pp={mesh.pp})"
            if mesh.pp > 1
            else "its level 2 counts backwards by itself, and here a step has many",
            "its level 3 hangs where stages run apart",
        )[zero]
        raise ValueError(
            f"zero_backend={name!r} does zero=1 only, not zero={zero} ({why}): use zero=1 with it, or zero={zero} "
            "without zero_backend"
        )
    return Spreading(zero, name)
