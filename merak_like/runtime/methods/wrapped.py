"""A reducer with something that follows the sum of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from merak_like.runtime.data_parallel import Gradients


class AfterSum:
    """``after()`` when all gradients are summed, before the norm."""

    def __init__(
        self, inner: Gradients, after: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None, end: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """``before()`` is called as a step begins, ``end()`` when the engine is closed."""
        self._inner, self._after, self._before, self._end = inner, after, before, end

    def begin(self) -> None:
        """Forget the last step."""
        self._before()
        self._inner.begin()

    def enter(self, stage: int, *, last: bool, whole: bool) -> None:
        """A backward of a stage begins."""
        self._inner.enter(stage, last=last, whole=whole)

    def finish(self) -> None:
        """Sum what is left, wait, and what follows."""
        self._inner.finish()
        self._after()

    def gradients(self) -> Mapping[str, Tensor | None]:
        """The last step's gradients by name, whole."""
        return self._inner.gradients()

    def close(self) -> None:
        """Leave the parameters alone."""
        self._end()
        self._inner.close()
