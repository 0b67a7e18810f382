"""The engine: one rank's stages, its order of actions, and the step.

``for action in order: do[action.kind](action)`` is all there is to a schedule here; what a step does was decided in the
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.schedules.action import Action, Edges, Kind
from merak_like.runtime import collect, rng
from merak_like.runtime.batches import LossWeight, filled, refuse_empty, weighed
from merak_like.runtime.checkpoint.contents import Contents
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.finite import Witness, report
from merak_like.runtime.groups import Groups
from merak_like.runtime.initialize import World
from merak_like.runtime.lasting import Count, Lasting
from merak_like.runtime.links import Links
from merak_like.runtime.names import Names, Numbers
from merak_like.runtime.optimizer import StepResult, Update, agree_on
from merak_like.runtime.orders import Orders
from merak_like.runtime.programs import Program, Programs
from merak_like.runtime.recording import Do, Observed
from merak_like.runtime.shortage import explained
from merak_like.runtime.speaking import Speaking
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards
from merak_like.runtime.watch import Watch


class Engine(Lasting, Speaking, Observed):
    """Trains a model as its plan says. Every rank of the job makes the same calls with the same batches."""

    def __init__(
        self, *, plan: Plan, model: nn.Module, parameters: Mapping[str, nn.Parameter],
        programs: Programs, links: Links, reducer: Gradients, update: Update,
        world: World, groups: Groups, watch: Watch, prepare: Callable[[Any], Any], loss_weight: LossWeight, seed: int,
        save: Callable[[nn.Module, Path, Mapping[str, Tensor]], None], shards: Shards = WHOLE,
        count: Count | None = None, mine: Sequence[int] | None = None, names: Names | None = None,
    ) -> None:  # fmt: skip
        """``mine`` are the step's micro-batches that this replica runs; None: those after the replicas' before it."""
        contents = Contents(model, plan, groups, update, seed, frozenset(parameters), shards, links)
        super().__init__(contents, world, watch, count)
        self.plan, self.model, self.optimizer = plan, model, update.optimizer
        self.world, self.groups = world, groups
        self._parameters, self._update = parameters, update
        self._programs, self._links, self._reducer = programs, links, reducer
        self._prepare, self._loss_weight, self._seed = prepare, loss_weight, seed
        self._save, self._shards, self.names = save, shards, names or Names()
        self._mine = mine or range(*(plan.micro_batches * (groups.coord.dp + i) for i in (0, 1)))
        self._orders = Orders(plan, groups.coord.pp)
        self._work = self._orders.at(programs.edges(), training=True)
        self._do: Do = {
            Kind.F: self._forward, Kind.R: self._recompute, Kind.B: self._backward, Kind.W: self._weight,
            Kind.SEND_F: self._send_forward, Kind.RECV_F: self._post_forward,
            Kind.SEND_B: self._send_backward, Kind.RECV_B: self._post_backward,
        }  # fmt: skip
        self._around_step: Callable[[], AbstractContextManager[None]] = nullcontext
        self._batches, self._running, self._shares = list[Any](), list[Program](), list[float]()
        self._made: dict[tuple[int, int], dict[str, Tensor]] = {}
        """What (micro-batch, stage) made, until its backward."""
        self._gradients: dict[tuple[int, int], dict[str, Tensor]] = {}
        """The gradients of what (micro-batch, stage) received, until they are sent or taken."""
        self._losses: dict[int, Tensor] = {}

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, batch: Any, *, batch_is_global: bool = True, samples: Numbers = None) -> StepResult:
        """Train on one batch: forward and backward of every micro-batch, reduce, clip, update.

        ``batch`` is the whole batch (the same on every rank) or, with ``batch_is_global=False``, this replica's share.
        ``samples`` number its rows, the same at a sample's every visit, for codecs that remember; others do not mind.
        Gradients stay readable until the next one. Raises FloatingPointError, before the weights change, for a loss or
        norm that is not finite, NoMemory, and PeerError when another rank is gone.
        """
        with self._at_work(), self._around_step():
            self._clear_gradients()
            self._update.begin(self.steps)
            total = self._run(batch, batch_is_global, training=True, samples=samples)
            self._reducer.finish()
            found = StepResult(*self._numbers(self._update.squares()), total)
            self._checkpoints.settle()
            result = self._update.apply(found, self.steps, partial(self._first_bad, batch, batch_is_global))
            self.steps += 1
            return result

    @torch.no_grad()
    def evaluate(self, batch: Any, *, batch_is_global: bool = True) -> StepResult:
        """The loss on a batch in evaluation mode; nothing is changed. ``grad_norm`` is 0."""
        modes = {module: module.training for module in self.model.modules()}
        with self._at_work():
            self.model.eval()
            try:
                total = self._run(batch, batch_is_global, training=False)
            finally:
                self._made.clear()
                for module, training in modes.items():
                    module.training = training
            return StepResult(self._numbers(0.0)[0], 0.0, total)

    def _run(self, batch: Any, batch_is_global: bool, *, training: bool, samples: Numbers = None) -> int:
        """Run every action of this rank's order; how many items the loss is the mean of."""
        own, replicas = (self._mine, self.plan.mesh.dp) if batch_is_global else (range(self.plan.micro_batches), 1)
        parts, weights = weighed(batch, len(own) * replicas, self._prepare, self._loss_weight)
        counts = {"items": sum(weights), "empty": float(not any(weights))}
        if not batch_is_global:
            alone = self.groups.coord.pp == self.groups.coord.tp == 0
            counts = agree_on({k: n if alone else 0 for k, n in counts.items()}, self.world, self._watch)
        refuse_empty(counts["empty"], batch_is_global)
        if training:
            self.names.tell(samples, parts, weights, own)
        whole = filled(parts, weights) if training or self.model.training else parts
        self._batches = [whole[i] for i in own]
        total = int(counts["items"])
        self._shares = [weights[i] / total for i in own]
        self._running = [self._programs.at(part) for part in self._batches]
        self._losses.clear()
        self._work = self._orders.at(self._edges(), training=training)
        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            for action in self._work.order:
                self._do[action.kind](action)
        self._links.flush()
        return total

    def _edges(self) -> Edges:
        """The stage pairs that talk in this step."""
        return frozenset(edge for program in self._running for edge in program.forward)

    def _forward(self, action: Action) -> dict[str, Tensor]:
        index, at = action.micro_batch, action.stage
        program = self._running[index]
        received: dict[str, Tensor] = {}
        for receive in self._work.waits.get(action, ()):
            received.update(self._links.take(receive))
        for giver in self._work.near[action]:
            made = self._made[index, giver]
            received.update((spec.name, made[spec.name]) for spec in program.forward.get((giver, at), ()))
        if program.random:
            self._enter_stream(action, received)
        stage = program.stages[at]
        put_off = (index, at) in self._work.put_off
        made = stage.forward(index, self._batches[index], received, put_off=put_off)
        if program.random:
            made[rng.RNG] = rng.state(self.world.device)
        if "loss" in stage.code.results:
            self._losses[index] = made["loss"].detach()
        self._made[index, at] = {name: made[name] for name in (*stage.code.sent, rng.RNG) if name in made}
        return {name: made[name] for name in stage.code.results}

    def _recompute(self, action: Action) -> None:
        self._running[action.micro_batch].stages[action.stage].recompute(action.micro_batch)

    def _backward(self, action: Action) -> None:
        index, at = action.micro_batch, action.stage
        program = self._running[index]
        stage = program.stages[at]
        gradients: dict[str, Tensor] = {}
        if "loss" in stage.code.results:
            gradients["loss"] = torch.full_like(self._losses[index], self._shares[index] * self._update.guard.scale)
        found = [self._links.take(receive) for receive in self._work.waits.get(action, ())]
        for giver in self._work.near[action]:
            theirs = self._gradients[index, giver]
            names = [spec.name for spec in program.backward((at, giver)) if spec.name in theirs]
            found.append({name: theirs.pop(name) for name in names})
        for name, gradient in (item for one in found for item in one.items()):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        whole = (index, at) not in self._work.put_off
        self._reducer.enter(at, last=action in self._work.last, whole=whole)
        self._gradients[index, at] = stage.backward(index, gradients)
        self._made.pop((index, at))

    def _weight(self, action: Action) -> None:
        self._reducer.enter(action.stage, last=False, whole=True)
        self._running[action.micro_batch].stages[action.stage].weight(action.micro_batch)

    def _send_forward(self, action: Action) -> None:
        specs = self._running[action.micro_batch].forward.get((action.stage, action.peer), ())
        self._links.send(action, specs, self._made[action.micro_batch, action.stage])

    def _post_forward(self, action: Action) -> None:
        specs = self._running[action.micro_batch].forward.get((action.peer, action.stage), ())
        self._links.post(action, specs)

    def _send_backward(self, action: Action) -> None:
        gradients = self._gradients[action.micro_batch, action.stage]
        specs = self._running[action.micro_batch].backward((action.peer, action.stage))
        unread = [spec for spec in specs if spec.name not in gradients]  # had no part in the loss
        zeros = {s.name: torch.zeros(s.shape, dtype=s.dtype, device=self.world.device) for s in unread}
        own = {s.name: zeros[s.name] if s in unread else gradients.pop(s.name) for s in specs}
        self._links.send(action, specs, own)

    def _post_backward(self, action: Action) -> None:
        specs = self._running[action.micro_batch].backward((action.stage, action.peer))
        self._links.post(action, [spec._replace(requires_grad=False) for spec in specs])

    # --- around the step -----------------------------------------------------------------------------------------

    def _numbers(self, squares: float) -> tuple[float, float]:
        """The step's loss and gradient norm, the same on every rank."""
        told = self._losses.items() if self.groups.coord.tp == 0 else ()  # all tensor-parallel ranks have the same
        loss = sum(float(x) * self._shares[i] for i, x in told if self._shares[i])
        numbers = {"loss": loss, "squares": squares, "signals": float(self._signals.seen)}
        agreed = agree_on(numbers, self.world, self._watch)
        self.stopping = self.stopping or agreed["signals"] > 0
        return agreed["loss"], agreed["squares"] ** 0.5

    @torch.no_grad()
    def _first_bad(self, batch: Any, batch_is_global: bool) -> str:
        """Run the forward of the step again, and say where the first number came up that is not finite."""
        witness = Witness(self.model, self._mine, self._batches)
        with witness.watching() as noting, self.doing(lambda do: {**do, Kind.F: noting(do[Kind.F])}):
            try:
                self._run(batch, batch_is_global, training=False)
            finally:
                self._made.clear()
        stage_of = {name: stage.index for stage in reversed(self.plan.stages) for name in stage.params}
        return report(witness.seen, self._reducer.gradients(), stage_of, self.world, self._watch)

    def _clear_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
        self._reducer.begin()
        self._made.clear()
        self._gradients.clear()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._open()
        with self._watch.telling(), explained(self):
            yield

    def _enter_stream(self, action: Action, received: dict[str, Tensor]) -> None:
        if action.stage == 0:
            rng.start(self._seed, self.steps, self._mine[action.micro_batch])
        else:
            rng.resume(received.pop(rng.RNG), self.world.device)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer by its name in the user's model, as CPU tensors: on rank 0, else {}."""
        self._open()
        own = self._update.entries(self.model)
        return collect.state_dict(own, self.plan, self._shards, self.groups, self.world, self._watch)

    def full_gradients(self) -> dict[str, Tensor]:
        """The last step's gradients by name, as CPU tensors: on rank 0, else {}. Parameters without one are absent."""
        self._open()
        mine = self._reducer.gradients()
        return collect.gradients(mine, self.plan, self._shards, self.groups, self.world, self._watch)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the whole model to a folder: safetensors, and for a Hugging Face model what ``from_pretrained`` needs.

        Every rank calls it; rank 0 writes; all return when the files are there.
        """
        state = self.full_state_dict()
        if self.world.rank == 0:
            self._save(self.model, Path(path), state)
        self.barrier()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        collect.barrier(self.world, self._watch)

    def close(self) -> None:
        """Let go of the process groups; another engine can be built in the same processes."""
        if not self._watch.closed:
            self._end()
            self.barrier()
            self._watch.close()
            self._reducer.close()
            self.groups.close()
            self._do = {}  # methods of this engine: a cycle, which would keep the groups and their threads for long
