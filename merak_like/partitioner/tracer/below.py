"""Inside ``torch.vmap`` torch's Python functions see batched tensors that code cannot name: record one level below."""

from __future__ import annotations

from typing import Any

from merak_like._compat import TorchDispatchMode
from merak_like.partitioner.tracer.costs import Costs
from merak_like.partitioner.tracer.counting import tensors_in
from merak_like.partitioner.tracer.draft import Draft
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.writer import Writer, outputs_of


class Below(TorchDispatchMode):
    """Writes down the kernels that a vmapped function comes to, with the batch dimension as an ordinary one."""

    def __init__(self, writer: Writer, costs: Costs) -> None:
        super().__init__()
        self.writer, self.costs = writer, costs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket.__name__)
        if func._schema.is_mutable:
            raise TraceError(f"{name}() under torch.vmap in {self.writer.where} changes a tensor in place")
        draft = self.costs.current = Draft("", "function", str(func), self.writer.scope[-1])
        out = func(*args, **kwargs)
        found = outputs_of(out)
        if found:
            self.writer.emit(draft, "call_function", func, args, kwargs)
            self.writer.finish(draft, found, [])
            self.costs.tally(name, args, kwargs, tensors_in(out))
        return out
