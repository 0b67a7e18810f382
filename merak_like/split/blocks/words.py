"""What a client that generates and a host of blocks say to each other, besides tensors.

HELLO Ask -> WELCOME Offer, and the host hangs up after a look; else, for each pass:
BEGIN Pass, UP_FORWARD values -> DOWN_FORWARD values
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from merak_like.split.messages import Count, Id, Message, Word

Print = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Ask(Message):
    """Client to host: what do you serve; or, with samples, keep keys and values for me."""

    digest: Id
    """Of the model (see ``Blocks``)."""
    first: Count = 0
    stop: Count = 0
    """Blocks ``first <= i < stop``."""
    pads: Annotated[tuple[Count, ...], Field(max_length=4096, strict=False)] = ()
    """Tokens of padding in front of each sample; none: only a look."""
    length: Count = 0
    """Most tokens of a text."""
    codec: Word = "identity"
    """For what the client sends."""
    back_codec: Word = "identity"
    """For what the host returns."""


class Offer(Message):
    """Host to client: the blocks it has, and what it has left."""

    first: Count
    stop: Count
    prints: Annotated[tuple[Print, ...], Field(max_length=4096, strict=False)]
    """Fingerprints of their weights."""
    left: Annotated[int, Field(ge=0)]
    """Bytes for keys and values that nobody has reserved."""
    token: Annotated[int, Field(ge=0)]
    """Bytes that one token of one sample takes in all its blocks."""
    session: Id | None = None


class Pass(Message):
    """Client to host: values of some tokens follow."""

    start: Count
    """Tokens of each sample that were before."""
    tokens: Annotated[int, Field(ge=1, le=512)]
