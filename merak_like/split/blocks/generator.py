"""Text from a causal language model whose blocks are hosted elsewhere: the client.

It has the model's ends, embedding and head, chooses every token, and keeps what it sent: a host that is lost costs
time, never a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merak_like.runtime.sampling import Sampling
from merak_like.split.blocks.chain import Chain
from merak_like.split.blocks.runner import Caches, Runner
from merak_like.split.blocks.shapes import chunks, shape_of
from merak_like.split.blocks.words import Ask
from merak_like.split.connection import Waits
from merak_like.split.dialler import Dialler
from merak_like.split.half import Source
from merak_like.split.tls import Keys
from merak_like.split.wire import CHUNK


class Generator:
    """One model; each call of ``generate`` opens sessions on the hosts and closes them."""

    def __init__(
        self, source: Source, *, connect: Sequence[str] = (), blocks: tuple[int, int] | None = None,
        keys: Keys | None = None, insecure: bool = False, codec: str = "identity", back_codec: str = "identity",
        waits: Waits | None = None, patience: float = 60.0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """``connect`` are the HOST:PORT of hosts; together they must have ``blocks`` (all of them unless given).

        All other blocks are here; without hosts the whole model is. A codec that loses something changes what is said.
        ``patience`` is how many seconds a text may go without a host for some of its blocks.
        Raises ValueError for a model that cannot be run block by block, and for blocks that it does not have.
        """
        self.runner = Runner(source, torch.device(device))
        count = self.runner.blocks.count
        first, stop = blocks or ((0, count) if connect else (0, 0))
        if not 0 <= first <= stop <= count or (first < stop) != bool(connect):
            raise ValueError(
                f"blocks {first}:{stop} of {count} on {len(connect)} hosts: give FIRST:STOP with 0 <= FIRST < STOP <= "
                f"{count} and hosts, or neither"
            )
        self.first, self.stop, self.patience = first, stop, patience
        self._ends = [(0, first + 1), (stop + 1, count + 2)] if first < stop else [(0, count + 2)]
        self.runner.load(self._ends)
        self._codecs = codec, back_codec
        self._dialler = Dialler(connect, keys, insecure, waits or Waits(), 8 * CHUNK) if connect else None
        self._prints: dict[int, str] = {}
        self.bytes: Counter[str] = Counter()
        """Bytes on the sockets, headers included: "sent" and "received"."""
        self.replaced: list[str] = []
        """Of every host that was lost while it had a text: which one, and why."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end: int | None = None,
        sampling: Sampling | None = None, on_tokens: Callable[[list[int | None]], None] = lambda tokens: None,
    ) -> list[list[int]]:  # fmt: skip
        """Each prompt's tokens with up to ``max_new_tokens`` behind them, or up to and with ``end``.

        ``on_tokens`` is called with each new token of each prompt, None where one has ended.
        Raises ValueError for an empty prompt and for texts that are too long, Lost when there are no hosts for long.
        """
        texts = [[int(token) for token in prompt] for prompt in prompts]
        if not texts or not all(texts) or max_new_tokens < 1:
            raise ValueError("generate needs prompts of at least one token, and at least one new token to make")
        widest = max(map(len, texts))
        length, most = widest + max_new_tokens, self.runner.cached.longest
        if most is not None and length > most:
            raise ValueError(
                f"a prompt of {widest} tokens and {max_new_tokens} new ones are {length}, the model has places for "
                f"{most}: at most {max(0, most - widest)} new ones"
            )
        choose, pads = sampling or Sampling(), tuple(widest - len(text) for text in texts)
        done = [False] * len(texts)
        text = _Text(self, pads, length)
        try:
            new = torch.tensor([[0] * pad + one for pad, one in zip(pads, texts, strict=True)])
            for _ in range(max_new_tokens):
                tokens = choose(text.logits(new))
                for i, token in enumerate(tokens):
                    if not done[i]:
                        texts[i].append(token)
                on_tokens([None if ended else token for token, ended in zip(tokens, done, strict=True)])
                done = [ended or token == end for token, ended in zip(tokens, done, strict=True)]
                if all(done):
                    break
                new = torch.tensor(tokens)[:, None]
        finally:
            text.close()
        return texts

    def close(self) -> None:
        """Let go of the network."""
        if self._dialler is not None:
            self._dialler.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chain(self, pads: Sequence[int], length: int) -> Chain | None:
        """Sessions on the hosts for some texts; None where all blocks are here."""
        if self._dialler is None:
            return None
        there, back = self._codecs
        digest = self.runner.blocks.digest
        ask = Ask(digest=digest, pads=tuple(pads), length=length, codec=there, back_codec=back)
        return Chain(
            self.runner, self._dialler, (self.first, self.stop), ask, patience=self.patience, prints=self._prints
        )


class _Text:
    """Some texts under way."""

    def __init__(self, its: Generator, pads: Sequence[int], length: int) -> None:
        self.its, self.pads, self.length, self.start = its, pads, length, 0
        runner = its.runner
        rooms = {i: room for i, room in enumerate(runner.blocks.rooms) if not its.first <= i < its.stop}
        self.chain = its.chain(pads, length)
        self.caches = Caches(rooms, len(pads), length, runner.device)

    def logits(self, new: Tensor) -> Tensor:
        """Of what follows these tokens (texts, tokens): (texts, words)."""
        found = torch.empty(0)
        for first, stop in chunks(len(self.pads), new.shape[1]):
            found = self._pass(new[:, first:stop])
        return found

    def _pass(self, ids: Tensor) -> Tensor:
        runner, ends, tokens = self.its.runner, self.its._ends, ids.shape[1]
        made = runner.run(ends[0], self.caches, self.pads, self.length, self.start, {}, ids)
        if self.chain is not None:
            known = self.chain.run(self.start, made, tokens)
            its = runner.ends(shape_of(len(self.pads), self.start, tokens, self.length), *ends[1])
            came = {spec.name: known[spec.name] for spec in its.sent}
            made = runner.run(ends[1], self.caches, self.pads, self.length, self.start, came)
        self.start += tokens
        return made["logits"][:, 0]

    def close(self) -> None:
        if self.chain is not None:
            self.chain.close()
            self.its.bytes.update(self.chain.bytes)
            self.its.replaced += self.chain.replaced
