"""An exchange whose encoding is behind the computing: a thread encodes and sends, one message after the other.

    engine's thread   head 0 ─ head 1 ─ head 2 ─ ...        hands over and computes on; decodes what comes
    coding thread         encode 0 ─ encode 1 ─ ...         then waits for the outbox where too much is under way

The order is the engine's, so frames and memories are those of an exchange without the thread. What goes wrong in it
ends the connection, and so is raised where the engine waits next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.split.connection import Lost
from merak_like.split.exchange import Channel, Exchange, Link, Way


class Ahead(Exchange):
    """For a side that has a device of its own; see ``Exchange`` for what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(1, "merak-coding")
        self._under_way: deque[Future[None]] = deque()

    def begin(self, channel: Channel, step: int, samples: Sequence[tuple[int, ...]], *, training: bool = True) -> None:
        """As any exchange, with nothing of a step before under way."""
        self._give_up()
        super().begin(channel, step, samples, training=training)

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Start encoding and sending some values, which nobody may change in place."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()
        kept = {spec.name: values[spec.name].detach() for spec in specs}
        self._under_way.append(self._thread.submit(self._put, link, way, micro_batch, kept, specs))

    def settle(self) -> None:
        """Wait until everything of this step is encoded; raises what went wrong in that."""
        while self._under_way:
            self._under_way.popleft().result()

    def state_dict(self) -> dict[str, Tensor]:
        """What the codecs remember, once all is encoded."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give up what is under way, and go on where ``state_dict`` was taken."""
        self._give_up()
        super().load_state_dict(state)

    def close(self) -> None:
        """End the thread."""
        self._give_up()
        self._thread.shutdown()

    def _put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        assert self.channel is not None
        try:
            super().put(link, way, micro_batch, values, specs)
        except BaseException as error:
            self.channel.close(error)
            raise

    def _give_up(self) -> None:
        """Of a step that failed nothing more is encoded; what waits to be sent is told that it need not."""
        begun = [one for one in self._under_way if not one.cancel()]
        if not all(one.done() for one in begun):
            assert self.channel is not None
            self.channel.close(Lost("the step was given up"))
        wait(self._under_way)
        self._under_way.clear()
