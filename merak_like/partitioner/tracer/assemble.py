"""From the writer's drafts to the frozen proxy graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merak_like.partitioner.graph import Call, Op, ProxyGraph
from merak_like.partitioner.tracer.calls import ModuleCall
from merak_like.partitioner.tracer.draft import Draft
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.fakes import FakeModel
from merak_like.partitioner.tracer.writer import Writer


def assemble(
    writer: Writer, calls: Sequence[ModuleCall], fake: FakeModel, outputs: Mapping[str, str], model: str
) -> ProxyGraph:
    """Freeze what was recorded. Raises TraceError for an atomic module that cannot stay whole."""
    for call in calls:
        if call.atomic and call.opaque and call.stop > call.first:
            raise TraceError(
                f"{call.path or 'the model'} must stay whole (it is compiled, has backward hooks or was named atomic), "
                f"but {call.opaque}: apply that to a smaller module"
            )
    names: dict[int, list[str]] = {}
    for draft in writer.drafts:
        for value, key in zip(draft.outputs, _storages(writer, draft), strict=True):
            names.setdefault(key, []).append(value.name)
    return ProxyGraph(
        ops=tuple(_op(draft, names) for draft in writer.drafts),
        parameters=fake.parameters,
        calls=tuple(Call(c.path, c.type, c.first, c.stop, c.depth) for c in calls if c.stop > c.first),
        pinned=_pinned(writer, calls, fake),
        outputs=dict(outputs),
        model=model,
    )


def _op(draft: Draft, names: Mapping[int, Sequence[str]]) -> Op:
    keeps = tuple(name for key in draft.kept for name in names.get(key, ()))
    return Op(
        draft.name, draft.kind, draft.target, draft.scope, tuple(draft.inputs), tuple(draft.outputs),
        tuple(draft.params), tuple(draft.buffers), tuple(draft.mutates),
        draft.flops, draft.moved, draft.saved, draft.kernels, draft.random, keeps,
    )  # fmt: skip


def _pinned(writer: Writer, calls: Sequence[ModuleCall], fake: FakeModel) -> tuple[tuple[int, int], ...]:
    """Op intervals that may not be cut.

    A tensor changed in place is made in the stage that changes it. A parameter or buffer is changed only if all its
    readers are in one stage. Every stage has its own copy of an input: whoever reads it after the change, under a name
    it had before, is in the stage that changes it.
    """
    drafts = writer.drafts
    made: dict[int, int] = {}
    maker: dict[str, int] = {}
    storage: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        for value, key in zip(draft.outputs, _storages(writer, draft), strict=True):
            made.setdefault(key, index)
            storage[value.name] = key
            maker[value.name] = index

    def old(name: str, key: int, index: int) -> bool:
        return storage.get(name) == key and maker[name] < index

    own_names = set(fake.names.values())
    intervals = {(c.first, c.stop - 1) for c in calls if c.atomic and c.stop - c.first > 1}
    for index, draft in enumerate(drafts):
        assert draft.node is not None
        for name, key in zip(draft.mutates, draft.node.meta.get("changes", ()), strict=False):
            if name in own_names:
                touching = [i for i, d in enumerate(drafts) if name in d.params or name in d.buffers]
            elif drafts[made[key]].kind == "input":
                touching = [index if drafts[maker[name]].kind == "input" else maker[name], index]
                touching += [
                    i for i in range(index + 1, len(drafts)) if any(old(n, key, index) for n in drafts[i].inputs)
                ]
            else:
                touching = [made[key], index]
            if touching[0] < touching[-1]:
                intervals.add((touching[0], touching[-1]))
    return tuple(sorted(intervals))


def _storages(writer: Writer, draft: Draft) -> list[int]:
    by_name = writer.by_name
    return [by_name[value.name].meta["storages"][0] for value in draft.outputs]
