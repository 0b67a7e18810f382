"""What replicas that spread their weights (ZeRO-3) hold of them whole, op by op, beside their own shares.

::

    before the blocks    the rest of the model (what no block has alone): it stays whole throughout a pass
    in a block           the rest; of the block its weights, their gradients, and the buffer of the messages with them;
                         gradients of what runs behind the blocks, which wait for the rest's sum
    behind the blocks    the rest, and the block whose backward comes first

As torch's ``fully_shard`` does with a group for each block and one for the rest. In a block's backward what was kept
behind the blocks is gone; where that is more, less is held than anywhere behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.states import StateBytes


def gathered_bytes(
    graph: ProxyGraph, borders: Sequence[int], states: StateBytes, *, scale: float = 1.0, stages: int = 1
) -> list[int]:
    """For each op, bytes on top of shares and activations; ``states`` as one replica alone would have them.

    ``borders`` are the ops at which blocks begin, and where the last ends; a model without is all rest. Of several
    stages, those between the first and the last have blocks alone, so the rest counts beside no block.
    """
    trained = {p.name: p.nbytes for p in graph.parameters if p.trainable and not p.buffer}
    reads = [{name for name in map(graph.canonical.get, op.params) if name in trained} for op in graph.ops]
    blocks = list(pairwise(borders))
    inside = [set[str]().union(*reads[first:stop]) for first, stop in blocks]
    first, last = (blocks[0][0], blocks[-1][1]) if blocks else (len(graph.ops), len(graph.ops))
    late = set[str]().union(*reads[last:])
    rest = late.union(*reads[:first])

    def weights(names: set[str]) -> int:
        return sum(trained[name] for name in names)

    whole = weights(rest) if blocks else weights(set(trained))
    waiting = ceil(states.gradients * weights(late))
    kept = sum(ceil(op.saved_bytes * scale) for op in graph.ops[last:])
    found = [whole + ceil(states.gradients * whole)] * len(graph.ops)
    for (begin, stop), names in zip(blocks, inside, strict=True):
        own = weights(names - rest)
        beside = whole if stages == 1 else 0
        back = own + 2 * ceil(states.gradients * own) + (beside + waiting - kept if stages == 1 else 0)
        found[begin:stop] = [max(back, beside + own)] * (stop - begin)
    if blocks:
        found[last:] = [whole + weights(inside[-1] - rest)] * (len(graph.ops) - last)
    return found
