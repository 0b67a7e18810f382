"""A host's other ranks: they do what the first one says, each with its part of every session's half."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from merak_like.runtime.links import NoLinks
from merak_like.split.commons import Commons, brought
from merak_like.split.crew import Crew
from merak_like.split.doors import door
from merak_like.split.enduring import Enduring
from merak_like.split.exchange import Exchange
from merak_like.split.groups import GroupText
from merak_like.split.half import Made, Source, build_half
from merak_like.split.messages import Begin, Task
from merak_like.split.outline import batch_of, blank
from merak_like.split.row import Row
from merak_like.split.training import Training, optimizer_of
from merak_like.split.trunk import Trunk


def own_half(source: Source, task: Task, example: Any, exchange: Exchange, device: torch.device, crew: Crew) -> Made:
    """A half of one client's own, as far as this rank has it."""
    return build_half(
        "host", source, task, example, exchange, links=NoLinks(), optimizer=optimizer_of(task.optimizer),
        device=device, crew=crew,
    )  # fmt: skip


class Helper:
    """One of the other ranks."""

    def __init__(self, source: Source, crew: Crew, device: torch.device) -> None:
        self.source, self.crew, self.device = source, crew, device
        self.halves: dict[str, Training] = {}
        self.trunk, self.commons = Trunk(source, crew, device), Commons(source, crew, device)
        self.member_of: dict[str, tuple[str, str]] = {}
        """Group and member by session."""
        self._do: dict[str, Callable[..., None]] = {
            "live": lambda: None, "open": self._open, "step": self._step, "save": self._save,
            "restore": self._restore, "close": self._close, "learn": self._learn, "keep": self._keep,
            "take up": self._take_up, "abreast": self._abreast,
        }  # fmt: skip

    def run(self) -> None:
        """Obey until rank 0 stops. Raises PeerError where it is gone."""
        while (order := self.crew.hear())["do"] != "stop":
            try:
                self._do[order.pop("do")](**order)
            except Exception as error:
                traceback.print_exception(error)  # rank 0 hears one line of it at most
                if self.crew.breaks(error):
                    raise
                # else rank 0 knows, and tells the edge
        self.crew.close()

    def _open(
        self, session: str, task: dict[str, Any], example: Any, group: dict[str, Any] | None, member: str
    ) -> None:  # fmt: skip
        agreed = Task.model_validate(task, strict=False)
        exchange = door(self.crew, agreed, self.device)
        build: Callable[..., Made] = self.trunk.build if agreed.lora is not None else self._own
        if group is not None:
            build = partial(self.commons.build, agreed.group or "", GroupText.model_validate(group, strict=False))
        made = self.crew.each(partial(build, agreed, blank(example), exchange))
        training = Training(
            made, exchange, agreed.optimizer, Path(session), agreed.checkpoint_every, self.crew
        )  # nothing is written here: the folder only names the session
        self.halves[session] = training
        if agreed.group is not None:
            self.member_of[session] = agreed.group, member

    def _own(self, task: Task, example: Any, exchange: Exchange) -> Made:
        return own_half(self.source, task, example, exchange, self.device, self.crew)

    def _step(self, session: str, begin: dict[str, Any], at: int) -> None:
        training = self.halves[session]
        training.engine.steps = at
        if session in self.member_of:
            group, member = self.member_of[session]
            training.put_buffers(self.commons.known[group].buffers)
            self.commons.known[group].show(member, training.made.model)
        told = Begin.model_validate(begin, strict=False)
        do = training.run if told.training else training.evaluate
        do(batch_of(told))

    def _abreast(self, steps: list[dict[str, Any]]) -> None:
        """Steps side by side, a thread each."""
        row = Row(len(steps), self.crew.breaks, self.crew.patience)
        row.begin()

        def run(place: int, told: dict[str, Any]) -> None:
            training = self.halves[told["session"]]
            exchange = training.exchange
            assert isinstance(exchange, Enduring)
            exchange.place = place
            here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
            try:
                with here, row.at(place, training.engine):  # a thread begins on the first device
                    self._step(**told)
            finally:
                exchange.place = 0

        with ThreadPoolExecutor(len(steps), "merak-abreast") as pool:
            runs = [pool.submit(run, place, told) for place, told in enumerate(steps)]
        failed = [error for one in runs if (error := one.exception()) is not None]
        if failed:
            raise next(filter(self.crew.breaks, failed), failed[0])

    def _save(self, session: str) -> None:
        self.halves[session].save({})

    def _restore(self, session: str) -> None:
        self.halves[session].restore(None)

    def _close(self, session: str) -> None:
        self.member_of.pop(session, None)
        self.halves.pop(session).close()

    def _learn(self, group: str, who: list[tuple[str, int, str]], update: int) -> None:
        parts = [brought(self.halves[session], items, session, member) for session, items, member in who]
        self.commons.known[group].learn(parts, update)

    def _keep(self, group: str) -> None:
        self.commons.known[group].state()

    def _take_up(self, group: str) -> None:
        self.commons.known[group].restore(None)
