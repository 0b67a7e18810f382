"""Automatic 3D-parallel training for PyTorch.

``import merak_like`` costs nothing: a public name brings its module, and torch where that module needs it, when it is
first used (PEP 562). ``merak_like.Plan`` can therefore be read on a machine without torch's seconds of start-up.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merak_like.api import auto_parallel as auto_parallel
    from merak_like.hf.trainer import HFTrainer as HFTrainer
    from merak_like.partitioner.graph import ProxyGraph as ProxyGraph
    from merak_like.partitioner.hardware import Hardware as Hardware
    from merak_like.partitioner.mesh import Mesh as Mesh
    from merak_like.partitioner.plan import Plan as Plan
    from merak_like.partitioner.planner import make_plan as make_plan
    from merak_like.partitioner.simulator import simulate as simulate
    from merak_like.partitioner.tracer import trace as trace
    from merak_like.runtime.engine import Engine as Engine
    from merak_like.trainer.loop import Trainer as Trainer
    from merak_like.trainer.settings import Settings as Settings

__version__ = "0.1.0"

# The same names again, for the running program: public name -> the module that defines it.
PUBLIC = {
    "Engine": "merak_like.runtime.engine",
    "HFTrainer": "merak_like.hf.trainer",
    "Hardware": "merak_like.partitioner.hardware",
    "Mesh": "merak_like.partitioner.mesh",
    "Plan": "merak_like.partitioner.plan",
    "ProxyGraph": "merak_like.partitioner.graph",
    "Settings": "merak_like.trainer.settings",
    "Trainer": "merak_like.trainer.loop",
    "auto_parallel": "merak_like.api",
    "make_plan": "merak_like.partitioner.planner",
    "simulate": "merak_like.partitioner.simulator",
    "trace": "merak_like.partitioner.tracer",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(
            f"module 'merak_like' has no attribute {name!r}; its names are {', '.join(sorted(PUBLIC))}"
        )
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])
