"""Text through hosts of blocks is the text that one process says: every token, whatever is lost on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like.runtime.sampling import Sampling
from merak_like.split.blocks.generator import Generator
from merak_like.split.blocks.route import Leg, route
from merak_like.split.blocks.runner import Caches, Runner, bytes_of
from merak_like.split.blocks.serving import BlockHost
from merak_like.split.blocks.shapes import MOST_TOKENS, chunks, shape_of
from merak_like.split.blocks.words import Ask
from merak_like.split.connection import Lost
from merak_like.split.half import Source
from merak_like.split.limits import Limits
from tests import split_models

transformers = pytest.importorskip("transformers")
NEW = 12


def source_of(model: nn.Module) -> Source:
    return Source(lambda: copy.deepcopy(model))


def said(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """By transformers in one process, each prompt alone."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with torch.no_grad():
        return [
            model.generate(torch.tensor([p]), pad_token_id=0, eos_token_id=None, **options)[0].tolist() for p in prompts
        ]


def prompts_of(*lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(1, split_models.WORDS, (n,), generator=drawn).tolist() for n in lengths]


Start = Callable[..., BlockHost]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts hosts in this process."""
    with ExitStack() as stack:

        def started(model: nn.Module, first: int, stop: int, **more: Any) -> BlockHost:
            folder = tmp_path / f"{time.monotonic_ns()}"
            host = BlockHost(source_of(model), first, stop, listen="127.0.0.1:0", folder=folder, **more)
            stack.enter_context(host)
            return host

        yield started


class Fleet:
    """A model, two hosts with half of its blocks each, and a client; their traces are made once."""

    def __init__(self, name: str, start: Start) -> None:
        self.model = getattr(split_models, name)()[0].eval()
        self.hosts = start(self.model, 0, 2), start(self.model, 2, 4)
        self.remote = generator(self.model, *self.hosts)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Fleet]]:
    with ExitStack() as stack:

        def started(model: nn.Module, first: int, stop: int) -> BlockHost:
            folder = tmp_path_factory.mktemp("host")
            host = BlockHost(source_of(model), first, stop, listen="127.0.0.1:0", folder=folder)
            stack.enter_context(host)
            return host

        made: dict[str, Fleet] = {}

        def one(name: str) -> Fleet:
            if name not in made:
                made[name] = Fleet(name, started)
                stack.enter_context(made[name].remote)
            return made[name]

        yield one


def generator(model: nn.Module, *hosts: BlockHost, **more: Any) -> Generator:
    return Generator(source_of(model), connect=[f"127.0.0.1:{host.port}" for host in hosts], patience=10, **more)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_are_those_of_one_process(name: str, fleet: Callable[[str], Fleet]):
    """Two hosts in a chain; prompts of two lengths together; greedy, and drawn with one seed."""
    prompts, drawn = prompts_of(5, 9), {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    model = getattr(split_models, name)()[0].eval()
    greedy = said(model, prompts)
    torch.manual_seed(3)  # before there are hosts, whose threads share this process's numbers
    by_chance = said(model, prompts[:1], do_sample=True, **drawn)
    remote = fleet(name).remote
    assert remote.generate(prompts, max_new_tokens=NEW) == greedy
    assert remote.generate(prompts[:1], max_new_tokens=NEW, sampling=Sampling(**drawn, seed=3)) == by_chance
    assert by_chance != greedy[:1]
    assert remote.replaced == []


def test_without_hosts_all_is_here():
    model = split_models.gpt2()[0].eval()
    with generator(model) as local:
        assert local.generate(prompts_of(5, 9), max_new_tokens=NEW) == said(model, prompts_of(5, 9))
        assert local.bytes["sent"] == 0


def test_hosts_give_bytes_of_hidden_states_and_nothing_else(fleet: Callable[[str], Fleet]):
    """One message each way for every pass and host: as many numbers as hidden states, and frames around them."""
    remote, before = fleet("gpt2").remote, fleet("gpt2").remote.bytes.copy()
    remote.generate(prompts_of(16), max_new_tokens=16)
    tokens, passes, width = 16 + 15, 16, 24
    for way in ("sent", "received"):
        got = remote.bytes[way] - before[way]
        assert 2 * 4 * width * tokens <= got <= 2 * (4 * width * tokens + 150 * passes + 1200), way


def test_some_blocks_here_some_there_and_parts_of_what_hosts_have(start: Start):
    model = split_models.llama()[0].eval()
    first, last = start(model, 0, 3), start(model, 1, 4)
    prompts = prompts_of(7)
    with generator(model, first, last, blocks=(1, 4)) as some:
        assert some.generate(prompts, max_new_tokens=NEW) == said(model, prompts)
        own = {n for n, p in some.runner.cached.model.named_parameters() if not p.is_meta}
        assert not any(f"layers.{i}." in n for n in own for i in (1, 2, 3))
        assert any("layers.0." in n for n in own)
    held = {n for n, p in last.registry.runner.cached.model.named_parameters() if not p.is_meta}  # type: ignore[attr-defined]
    assert held
    assert not any("embed_tokens" in n or "layers.0." in n or "lm_head" in n for n in held)


def test_long_prompts_in_several_passes(fleet: Callable[[str], Fleet], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("merak_like.split.blocks.shapes.MOST_TOKENS", 8)
    prompts = prompts_of(19)
    made = fleet("gpt2").remote.generate(prompts, max_new_tokens=4)
    assert made == said(fleet("gpt2").model, prompts, max_new_tokens=4)


def test_it_stops_at_the_end_token(fleet: Callable[[str], Fleet]):
    model, remote = fleet("gpt2").model, fleet("gpt2").remote
    prompts = prompts_of(5, 9)
    all_of_it = said(model, prompts)
    end = all_of_it[0][5 + 3]
    seen: list[list[int | None]] = []
    texts = remote.generate(prompts, max_new_tokens=NEW, end=end, on_tokens=seen.append)
    for text, whole, prompt in zip(texts, all_of_it, prompts, strict=True):
        new = whole[len(prompt) :]
        assert text == prompt + new[: new.index(end) + 1 if end in new else NEW]
    assert [row[0] for row in seen if row[0] is not None] == texts[0][5:]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_a_host_that_goes_is_replaced_without_a_wrong_token(name: str, start: Start):
    """It drains in the middle; two others that have its blocks between them take its place."""
    model = getattr(split_models, name)()[0].eval()
    prompts = prompts_of(5, 9)
    going, *others = start(model, 0, 4), start(model, 0, 1), start(model, 1, 4)
    count = 0

    def leave(_: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            going.close()

    with generator(model, going, *others) as remote:
        assert remote.generate(prompts, max_new_tokens=NEW, on_tokens=leave) == said(model, prompts)
        assert len(remote.replaced) == 1
        assert str(going.port) in remote.replaced[0]


def test_admission_reserves_before_it_allocates_and_says_what_would_fit(start: Start, fleet: Callable[[str], Fleet]):
    model, rooms = fleet("gpt2").model, fleet("gpt2").remote.runner.blocks.rooms
    limits = Limits(memory=bytes_of(rooms, 1, 64))
    host = start(model, 0, 4, limits=limits)
    its: Any = host.registry
    ask = Ask(digest=its.runner.blocks.digest, first=0, stop=4, pads=(0,), length=30)
    with its.opened(ask, "one") as session:
        assert session.caches.nbytes == its.ledger.held == limits.memory
        with pytest.raises(ValueError, match="0 are left: nothing would fit"), its.opened(ask, "two"):
            pass
    assert its.ledger.held == 0
    two = ask.model_copy(update={"pads": (0, 0)})
    with (
        pytest.raises(ValueError, match=r"take 98304 bytes, 49152 are left: 1 x 64 tokens would fit"),
        its.opened(two, "x"),
    ):
        pass
    with generator(model, host) as remote:
        remote.patience = 0.5
        with pytest.raises(Lost, match=r"no hosts for blocks 0:4 .* 1 x 64 tokens would fit"):
            remote.generate(prompts_of(5, 5), max_new_tokens=4)
        assert its.ledger.held == 0
        assert len(remote.generate(prompts_of(5), max_new_tokens=4)[0]) == 9


def test_a_host_with_other_weights_is_not_taken(start: Start):
    model = split_models.gpt2()[0].eval()
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.get_parameter("transformer.h.1.attn.c_proj.weight"))
    good, bad = start(model, 0, 4), start(other, 0, 4)
    prompts = prompts_of(5)

    def leave(_: Any) -> None:
        good.close()

    with generator(model, good, bad) as remote:
        remote.patience = 1.0
        with pytest.raises(Lost, match="its weights of block 1 are not those of the other hosts"):
            remote.generate(prompts, max_new_tokens=NEW, on_tokens=leave)


def test_what_is_refused(start: Start):
    model = split_models.gpt2()[0].eval()
    host = start(model, 0, 2)
    with pytest.raises(ValueError, match="blocks 2:5 of a model with 4"):
        start(model, 2, 5)
    config = transformers.BloomConfig(n_layer=1, hidden_size=8, n_head=2)
    with pytest.raises(ValueError, match="takes no position_ids"):
        Generator(Source(lambda: transformers.BloomForCausalLM(config)))
    with pytest.raises(ValueError, match="blocks 3:1 of 4"):
        generator(model, host, blocks=(3, 1))
    with generator(model, host) as remote:
        with pytest.raises(ValueError, match="at most 7 new ones"):
            remote.generate(prompts_of(25), max_new_tokens=NEW)
        with pytest.raises(ValueError, match="at least one token"):
            remote.generate([[]], max_new_tokens=1)
        remote.patience = 0.3
        with pytest.raises(Lost, match="nobody has blocks 2:4"):
            remote.generate(prompts_of(5), max_new_tokens=1)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2))
    with generator(other, host, blocks=(0, 2)) as wrong:
        with pytest.raises(ValueError, match="the host refuses: this host serves another model"):
            wrong.generate([[3]], max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p is a probability"):
        Sampling(top_p=0.0)


def test_routes_have_the_fewest_hosts():
    assert route(0, 8, {0: (0, 4), 1: (0, 6), 2: (4, 8), 3: (6, 8)}) == [Leg(1, 0, 6), Leg(2, 6, 8)]
    assert route(2, 5, {0: (0, 8)}) == [Leg(0, 2, 5)]
    with pytest.raises(ValueError, match="nobody has blocks 4:6"):
        route(0, 8, {0: (0, 4), 1: (6, 8)})


def test_shapes_are_few():
    seen = {shape_of(1, at, 1, 4000) for at in range(4000)} | {shape_of(1, 0, n, 4000) for n in range(1, MOST_TOKENS)}
    assert len(seen) <= 7 + 10 + 4
    assert all(shape_of(1, at, 1, 4000).width > at for at in range(4000))
    assert chunks(4, 300) == [(0, 128), (128, 256), (256, 300)]


def test_what_is_filled_up_is_written_nowhere(fleet: Callable[[str], Fleet]):
    """Room behind the last real token stays as it was; only real tokens come back."""
    its: Any = fleet("gpt2").hosts[0].registry
    runner: Runner = its.runner
    caches = Caches(dict(enumerate(runner.blocks.rooms[:2])), 1, 20, runner.device)
    ends = runner.ends(shape_of(1, 0, 5, 20), 1, 3)
    torch.manual_seed(0)
    made = runner.run((1, 3), caches, (0,), 20, 0, {ends.sent[0].name: torch.randn(1, 5, 24)})
    assert [x.shape for x in made.values()] == [(1, 5, 24)]
    keys = caches.kept[1][0]
    assert keys[:, :, :5].abs().amin() > 0
    assert keys[:, :, 5:].abs().amax() == 0
