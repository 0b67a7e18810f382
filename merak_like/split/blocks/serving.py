"""A host of blocks: the host of split fine-tuning, with other sessions behind its door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from merak_like.split.blocks.rooms import Rooms
from merak_like.split.blocks.runner import Runner
from merak_like.split.blocks.words import Ask
from merak_like.split.connection import Connection
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import parse
from merak_like.split.tls import Keys
from merak_like.split.wire import Key, Kind


class BlockHost(Host):
    """Runs blocks ``first <= i < stop`` of a causal language model for many clients; each has its keys and values."""

    def __init__(
        self, source: Source, first: int, stop: int, *, listen: str, folder: str | Path, keys: Keys | None = None,
        insecure: bool = False, limits: Limits | None = None, status: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """As ``Host``; ``limits.memory`` is for keys and values. Loads the weights of its blocks and no others.

        Raises ValueError for blocks that the model does not have, and for a model that takes no cache.
        """
        self._span = first, stop
        super().__init__(
            source, f"{first}:{stop}", listen=listen, folder=folder, keys=keys, insecure=insecure, limits=limits,
            status=status, device=device,
        )  # fmt: skip

    def _sessions(self, source: Source, cut: str, groups: Any) -> Any:
        return Rooms(Runner(source, self.turn.device), *self._span, self.limits, self.turn)

    def _converse(self, connection: Connection, owner: str, facts: dict[str, Any]) -> None:
        rooms: Any = self.registry
        ask = parse(Ask, connection.receive(Key(Kind.HELLO), self.limits.waits.hello))
        if not ask.pads:
            connection.send(Key(Kind.WELCOME), rooms.offer().body())
            return
        with rooms.opened(ask, owner) as session:
            facts["session"] = session.id
            rooms.admit(session, connection)
            self.audit.note("opened", blocks=f"{ask.first}:{ask.stop}", samples=len(ask.pads), **facts)
            connection.send(Key(Kind.WELCOME), rooms.offer(session.id).body())
            rooms.serve(
                session, connection, self.draining.is_set, lambda tokens: self.metrics.add("merak_tokens_total", tokens)
            )
