"""``auto_parallel``: the straight line from a model to an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merak_like import __version__
from merak_like.choosing import best_layout, degree_of, form_of, level_of
from merak_like.deciding import cut, divided, micro_batch, settled
from merak_like.ds_config.rates import Rate
from merak_like.ds_config.read import ARGUMENTS, arguments
from merak_like.habits import habits
from merak_like.partitioner.executable import ENGINE
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.layouts import Wanted
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import coding_in
from merak_like.partitioner.this_machine import this_machine
from merak_like.partitioner.tracer import LossFn
from merak_like.runtime import collect
from merak_like.runtime.batches import LossWeight, rows
from merak_like.runtime.coded_links import CodedLinks, coding_of, link_codec
from merak_like.runtime.engine import Engine
from merak_like.runtime.fully_sharded import Whole
from merak_like.runtime.groups import make_groups
from merak_like.runtime.initialize import join, world_size
from merak_like.runtime.lasting import Count
from merak_like.runtime.learning import Held, learning
from merak_like.runtime.links import DistLinks, Links, NoLinks
from merak_like.runtime.materialize import materialize
from merak_like.runtime.methods.method import Job, Method, Methods
from merak_like.runtime.names import Names
from merak_like.runtime.optimizer import OptimizerFactory, Update
from merak_like.runtime.precision import Precision, precision_of
from merak_like.runtime.programs import Programs
from merak_like.runtime.spreading import spreading_of
from merak_like.runtime.watch import Watch

Degree = int | str


def auto_parallel(
    model: nn.Module,
    dp: Degree = 1,
    pp: Degree = 1,
    tp: Degree = 1,
    *,
    example: Any,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: str = "1f1b",
    chunks: int | None = None,
    recompute: str = "auto",
    micro_batches: int | None = None,
    sequence_parallel: bool | str = False,
    max_grad_norm: float | None = None,
    rate: Rate | None = None,
    skip_not_finite: int = 0,
    precision: str | Precision | None = None,
    zero: int | str = 0,
    zero_backend: str | None = None,
    ds_config: Mapping[str, Any] | str | Path | None = None,
    methods: Sequence[Method] = (),
    loss_weight: LossWeight | None = None,
    weights: str | Path | None = None,
    plan: Plan | None = None,
    hardware: Hardware | str | None = None,
    memory_limit: int | None = None,
    tp_shares: int = 1,
    codec: str | None = None,
    fuse: bool = True,
    device: torch.device | str | None = None,
    timeout: float = 600.0,
    seed: int = 0,
) -> Engine:
    """Train an unmodified model over ``dp x pp`` ranks started by torchrun, with the numbers of one process.

    Call it on every rank with the same arguments; without torchrun it is one process, 1 x 1 x 1.

    ``example`` is one whole batch, as ``engine.step`` will get it; it is cut along dimension 0 into
    ``dp * micro_batches`` micro-batches. The model gives its own loss, or ``loss_fn(outputs, batch)`` does. The model
    may be on the meta device: each rank then makes or reads (``weights``) only its own part. ``optimizer`` is called
    with this rank's parameters. ``loss_weight(micro_batch)`` counts the items that a micro-batch's loss is the mean of:
    by default target tokens for Hugging Face language models, else samples. ``schedule``, ``chunks`` (stages per rank,
    for "interleaved") and ``recompute`` ("auto": what memory asks for, "none", "full") are those of ``make_plan``.
    A degree ``"auto"`` is chosen, with the number of micro-batches, for the ranks that torchrun started, the example's
    batch and the memory; degrees that are given stay. ``tp_shares`` of 2 or more runs each micro-batch in so many
    parts, the sums over tensor-parallel ranks of one part under the compute of another. ``sequence_parallel`` divides
    activations outside of sharded weights among these ranks too, by rows. ``zero`` spreads the optimizer's state (1),
    gradients (2) and, with pp=tp=1, weights (3, by torch's ``fully_shard``) over replicas; ``zero_backend`` "deepspeed"
    or "deepspeed-offload" (state and update on the CPU) lets DeepSpeed's optimizer do level 1. ``zero`` and
    ``sequence_parallel`` may be ``"auto"`` too. ``rate`` gives each step's learning rate from step and a group's own.
    ``ds_config`` is a DeepSpeed configuration; what it says is honoured, or refused by name. ``methods`` of
    ``merak_like.runtime.methods`` change how stages run or gradients are treated. ``fuse`` runs activations that the
    model spells out as the one kernel of torch that computes the same up to rounding. ``codec`` is what values go
    through between stages, such as "int8", or "int4|int8" for activations and gradients (docs/codecs.md); "aqsgd(4)"
    remembers samples, which ``engine.step(batch, samples=...)`` then names. ``plan`` obeys a plan made before.
    ``timeout`` in seconds limits every wait for another rank.

    Raises ValueError, with the nearest thing that works, for degrees that do not fit the job, a model that cannot be
    traced or cut, memory that does not suffice, and ranks that do not agree.
    """
    degrees = {axis: degree_of(axis, degree) for axis, degree in (("dp", dp), ("pp", pp), ("tp", tp))}
    if ds_config is not None:
        given = (optimizer, rate, micro_batches, max_grad_norm, precision, zero, zero_backend)
        told = arguments(ds_config, degrees, rows(example), dict(zip(ARGUMENTS, given, strict=True)))
        optimizer, rate, micro_batches, max_grad_norm, precision, zero, zero_backend = told.values()
    wire = link_codec(codec, degrees["pp"])
    level, form = level_of(zero, zero_backend, optimizer is not None), form_of(sequence_parallel)
    chosen = None in (*degrees.values(), level, form)
    mesh = Mesh(world_size()) if chosen else Mesh(*(degree or 1 for degree in degrees.values()))
    spread = spreading_of(level or 0, zero_backend, mesh)
    if spread.deepspeed and optimizer is None:
        raise ValueError(f"zero_backend={zero_backend!r} spreads an optimizer's state: pass optimizer= too")
    precise = precision_of(precision)
    world = join(mesh, timeout=timeout, device=device, grouped=spread.deepspeed)
    if not model.training:
        model.train()
    watch = Watch(world.rank, world.timeout, world.pulse)
    with watch.starting(), ExitStack() as lowered:
        lowered.enter_context(precise.applied(model))
        example = precise.inputs(example)
        if plan is None and hardware is None:  # one measurement for all, or each rank would plan for itself
            measure = partial(this_machine, device=world.device.type) if world.rank == 0 else None
            hardware = collect.from_first(measure, world, watch)
        coding = coding_of(wire, model)
        if chosen and plan is not None:
            mesh, level = plan.mesh, plan.zero if level is None else level
            form = plan.sequence_parallel if form is None else form
        elif chosen:
            wanted = Wanted(
                world.size, rows(example), **degrees, micro_batches=micro_batches, schedule=schedule, chunks=chunks,
                recompute=None if recompute == "auto" else recompute, zero=level, sequence_parallel=form,
                memory_limit=memory_limit, executable=ENGINE, coding=coding,
            )  # fmt: skip
            layout = best_layout(model, example, loss_fn, wanted, hardware, precise.states())
            mesh, micro_batches, recompute = layout.mesh, layout.micro_batches, layout.recompute
            level, form = layout.zero, layout.sequence_parallel
        spread, sequence_parallel = spreading_of(level or 0, zero_backend, mesh), bool(form)
        if plan is not None and plan.mesh != mesh:
            raise ValueError(
                f"the plan is for {plan.mesh}, asked for {mesh}: make the plan again or change the degrees"
            )
        if plan is not None and (counted := coding_in(plan)) is not None and counted.text != wire:
            raise ValueError(
                f"the plan counts on codec={counted.text!r} between stages, asked for {codec!r}: pass it too, or make "
                "the plan again"
            )
        micro, told = micro_batch(example, mesh, plan.micro_batches if plan else micro_batches or 1), ()
        if plan is None:
            methods, told = settled(
                methods, model, loss_fn, example, mesh, micro_batches, spread, precise, schedule=schedule,
                chunks=chunks, recompute=recompute, hardware=hardware or "a100-80gb", memory_limit=memory_limit,
                fuse=fuse, on_cpu=world.device.type == "cpu", coding=coding,
            )  # fmt: skip
        plugged = Methods(
            methods,
            Job(plan.schedule if plan else schedule, mesh.tp, tp_shares, spread.zero, precise.compute is not None),
        )
        parts, recompute = divided(
            model, loss_fn, mesh, spread, recompute=recompute, tp_shares=tp_shares, sequence_parallel=sequence_parallel,
            fuse=fuse,
        )  # fmt: skip
        parts = plugged.around(parts, model)
        # on the CPU whatever the device, so that a plan does not depend on where it was made
        rough = parts.trace(micro, "cpu")
        proof = collect.from_first(partial(parts.prove, rough, micro) if world.rank == 0 else None, world, watch)
        parts.believe(proof)
        if plan is not None:
            parts.graph(rough)  # it decides how weights lie
        else:
            plan, rough, micro = cut(
                parts, rough, micro, example, mesh, micro_batches, proof, methods, schedule=schedule, chunks=chunks,
                recompute=recompute, hardware=hardware or "a100-80gb", memory_limit=memory_limit, zero=spread.zero,
                sequence_parallel=sequence_parallel, coding=coding,
                states=precise.states(elsewhere=spread.offload and world.device.type != "cpu"),
            )  # fmt: skip
            plan = plan.with_notes(told)
        facts = {"plan": plan.digest, "merak_like": __version__, "torch": torch.__version__}
        choices = {
            "seed": seed, "max_grad_norm": max_grad_norm, "precision": precise, "zero": spread,
            "sequence_parallel": sequence_parallel, "tp_shares": tp_shares, "fuse": fuse, "methods": tuple(methods),
            "codec": wire,
        }  # fmt: skip
        collect.agree(facts | {name: str(choice) for name, choice in choices.items()}, world, watch)
        if world.device.type != "cpu":
            rough = parts.trace(micro, world.device)
        if isinstance(parts, Whole):
            parts.check(plan)
        if plan.starts[-1] != len(rough.graph.ops):
            raise ValueError(
                f"the plan cuts {plan.starts[-1]} ops, but {type(model).__name__} runs {len(rough.graph.ops)} for "
                f"micro-batches of {rows(micro)} samples: make the plan from this model and an example of that size"
            )
        sums = {name: (plan.shared.get(name, ()), parts.partial(name)) for s in plan.stages for name in s.params}
        groups = make_groups(
            mesh, world, plan.stage_rank, list(sums.values()), parts.spans(), replicas=spread.deepspeed
        )  # fmt: skip
        shards = parts.shards(groups.coord.tp)
        own = [stage for stage in plan.stages if stage.rank == groups.coord.pp]
        initialise, counted, save = habits(model)
        lowered.close()  # weights are made in the model's own precision
        parameters = materialize(
            model, plan, [s.index for s in own], world.device, seed=seed, initialise=initialise, weights=weights,
            shards=shards,
        )  # fmt: skip
        collect.agree_on_weights({shards.label(name): p for name, p in parameters.items()}, world, watch)
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        holders = collect.holders(plan)
        readers = {name: frozenset(s.index for s in own if name in s.params) for name in trainable}
        pending = Counter[int]()
        precise.lower(model, trainable.values())
        held = Held(
            trainable, {name: groups.sums[sums[name]] for name in trainable}, readers,
            {name for name in trainable if holders[name] == groups.coord.pp}, pending,
        )  # fmt: skip
        shared = {name for name in trainable if sums[name] != ((), ())}
        paths = {call.path for call in rough.calls}
        count = Count()
        mine = range(*(plan.micro_batches * (groups.coord.dp + i) for i in (0, 1)))
        links: Links = DistLinks(groups, watch, world.device) if mesh.pp > 1 else NoLinks()
        names = Names(wire if mesh.pp > 1 else None)
        if names.text is not None:
            links = CodedLinks(
                links, names.text, steps=lambda: count.done, mine=mine, seed=seed, device=world.device, names=names
            )  # fmt: skip
        learns = learning(model, held, optimizer, spread, precise, parts, groups, watch, world.device, paths)
        return Engine(
            plan=plan,
            model=model,
            parameters=learns.parameters,
            programs=Programs(
                model, plan, rough, micro, groups.coord.pp, world.device, parts, parts.prepare(groups, watch), pending
            ),
            links=links,
            mine=mine,
            names=names,
            reducer=plugged.gradients(
                learns.reducer, model, trainable, shared, learns.optimizer, groups, world, watch, lambda: count.done
            ),
            count=count,
            update=Update(
                learns.slots,
                learns.optimizer,
                max_grad_norm=max_grad_norm,
                guard=precise.guard(skip_not_finite),
                store=learns.store,
                whole=learns.whole,
                answers=shards.answers,
                rate=rate,
            ),
            world=world,
            groups=groups,
            watch=watch,
            prepare=precise.inputs,
            loss_weight=loss_weight or (counted if loss_fn is None else None) or rows,
            seed=seed,
            save=save,
            shards=shards,
        )
