"""A group's weights as AdaSplit has them (adasplit.py): common, and each member sees them through a sparse mask.

    session of i      weights * mask_i  ──►  loss, g = gradient of the product
    weights           learn from g * mask_i; those that i does not see stay
    mask_i            learns from g * weights + strength (of its L1 term); what reaches zero stays there until of use

Whose turn is next, a ``Chooser`` decides at the end of each round, by the losses of those that were heard. On several
ranks each has the masks of its part of the weights, and the one that talks to the edges decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from merak_like.split import checkpoint
from merak_like.split.checkpoint import State
from merak_like.split.choosing import Chooser
from merak_like.split.common import Common, Part
from merak_like.split.crew import Crew
from merak_like.split.groups import GroupText, heard_of
from merak_like.split.half import Made
from merak_like.split.training import rate


class Masked(Common):
    """Shared weights, the members' masks, and who is heard."""

    def __init__(self, made: Made, text: GroupText, crew: Crew) -> None:
        super().__init__(made, text, crew)
        self.masks: dict[str, dict[str, Tensor]] = {
            member: {name: torch.ones_like(self.weights[name], requires_grad=True) for name in self.trained}
            for member in text.members
        }
        self._learners = {
            m: torch.optim.Adam(mask.values(), text.mask_rate) if mask else None for m, mask in self.masks.items()
        }
        self._chooser = Chooser(len(text.members), text.decay)
        self._losses: dict[str, float] = {}

    def seen_by_one(self) -> Mapping[str, nn.Parameter]:
        """Copies, for each member sees them in a way of its own."""
        return {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in self.weights.items()}

    @torch.no_grad()
    def show(self, member: str, model: nn.Module) -> None:
        """Let a session's weights be what its member sees."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                own, mask = self.weights[name], self.masks[member].get(name)
                parameter.copy_(own if mask is None else own * mask)

    def learn(self, parts: Sequence[Part], update: int) -> None:
        """Change the weights and one member's mask."""
        (part,) = parts
        mask = self.masks[part.member]
        for name in self.trained:
            gradient = part.gradients.get(name, torch.zeros_like(self.weights[name]))
            self.weights[name].grad = gradient * mask[name].detach()
            mask[name].grad = gradient * self.weights[name].detach() + self.text.mask
        before = {name: self.weights[name].detach().clone() for name in self.trained}
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.text.optimizer, update)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if (learner := self._learners[part.member]) is not None:
            learner.step()
        with torch.no_grad():
            for name in self.trained:
                mask[name].clamp_(min=0.0)
                self.weights[name].copy_(torch.where(mask[name] > 0, self.weights[name], before[name]))
        self.mean_buffers(parts)
        self._losses[part.member] = part.loss

    def next(self) -> tuple[str, ...]:
        """A round is over: who is heard in the next, in this order."""
        members = self.text.members
        self._chooser.heard({members.index(name): loss for name, loss in self._losses.items()})
        self._losses.clear()
        return tuple(members[index] for index in self._chooser.choose(heard_of(self.text)))

    def seen(self, member: str) -> float:
        """Share of the weights that a member sees."""
        mask = self.masks[member].values()
        return sum(int((m > 0).sum()) for m in mask) / max(1, sum(m.numel() for m in mask))

    def _mine(self) -> State:
        """With masks and what their optimizers remember; and on the rank that chooses, whom it has heard."""
        common = super()._mine()
        tensors, facts = dict(common.tensors), dict(common.facts)
        learners = {m: checkpoint.optimizer_state(one, self.trained) for m, one in self._learners.items()}
        for member, mask in self.masks.items():
            tensors |= checkpoint.under(f"mask/{member}/", {name: m.detach() for name, m in mask.items()})
            tensors |= checkpoint.under(f"learner/{member}/", learners[member].tensors)
        facts["learners"] = {m: dict(state.facts) for m, state in learners.items()}
        if not self._crew.world.rank:
            facts["chooser"], facts["losses"] = self._chooser.state(), dict(self._losses)
        return State(tensors, facts)

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        """Go back, or on; members that are new keep masks of ones."""
        super()._restore(state)
        for member, mask in self.masks.items():
            for name, tensor in checkpoint.of(f"mask/{member}/", state.tensors).items():
                if name in mask:
                    mask[name].copy_(tensor)
            facts = state.facts["learners"].get(member, {})
            if "groups" in facts:
                found = State(checkpoint.of(f"learner/{member}/", state.tensors), facts)
                checkpoint.load_optimizer(self._learners[member], self.trained, found)
        self._chooser.load(state.facts["chooser"])
        self._losses = dict(state.facts["losses"])
