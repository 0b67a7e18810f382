"""Where a model is cut between an edge and its cloud, as people write it and on a trace.

transformer.h.0:transformer.ln_f           the edge keeps all up to block 0, and all from the last norm on (U-shaped)
bert.encoder.layer.1@8:bert.pooler.dense   the same, and layer 1 is changed to send 8 numbers a token (SFT)
transformer.h.0                            the cloud has the head and is given the labels

ops   0 ............ first ........ last ............ end
      edge's head  │ cloud's half │ edge's tail (head of the model, loss)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from merak_like.partitioner.cuts import check_starts, find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.split.sft import cut_of


@dataclass(frozen=True)
class Cut:
    """What the edge keeps, by module paths."""

    front: str
    """The last module of the edge's head. With a rank, the layer that is changed."""
    back: str | None = None
    """The first module of the edge's tail; None: there is none, and the cloud gets the labels."""
    rank: int | None = None
    """Numbers a token that cross a changed layer; None: the layer stays as it is."""

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Read ``FRONT[@RANK][:BACK]``. Raises ValueError for anything else."""
        match = re.fullmatch(r"([^@:\s]+)(?:@(\d+))?(?::([^@:\s]+))?", text.strip())
        if match is None:
            raise ValueError(f"a cut is FRONT[@RANK][:BACK], such as transformer.h.0:transformer.ln_f; found {text!r}")
        return cls(match[1], match[3], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        rank = f"@{self.rank}" if self.rank is not None else ""
        back = f":{self.back}" if self.back is not None else ""
        return f"{self.front}{rank}{back}"

    def starts(self, graph: ProxyGraph) -> tuple[int, ...]:
        """The first op of head, cloud's half and tail, and the end; without a tail one number fewer.

        Raises ValueError for a module that the model does not call exactly once, and for a cut that is not possible.
        """
        first = _call(graph, self.front)[1] if self.rank is None else cut_of(graph, self.front)
        last = None if self.back is None else _call(graph, self.back)[0]
        if last is not None and last <= first:
            raise ValueError(f"the cut {self} leaves the cloud nothing: {self.back} does not come after {self.front}")
        starts = (0, first, *([] if last is None else [last]), len(graph.ops))
        legal = find_cuts(graph).legal
        for position, path in ((first, f"after {self.front}"), (last, f"before {self.back}")):
            if position is not None and not legal[position]:
                raise ValueError(f"the model cannot be cut {path}: ops there must stay together; take another module")
        check_starts(graph, starts)
        return starts


def _call(graph: ProxyGraph, path: str) -> tuple[int, int]:
    """The ops ``first <= i < stop`` of a module that runs once."""
    calls = [call for call in graph.calls if call.path == path]
    if len(calls) != 1:
        paths = sorted({call.path for call in graph.calls if call.path})
        near = ", ".join(get_close_matches(path, paths, 3, cutoff=0.2)) or "no other"
        raise ValueError(f"a cut needs a module that runs once; {path!r} runs {len(calls)} times. Near it: {near}")
    return calls[0].first, calls[0].stop
