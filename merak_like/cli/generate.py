"""``merak generate``: text from a causal language model, with blocks that are hosted elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merak_like.cli.halves import half_source

if TYPE_CHECKING:
    from merak_like.hf.text import Tokenizer


def run(
    model: Annotated[str, typer.Option("--model", help="Folder with config.json and safetensors, or module:function.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A text, or numbers of tokens: 5,17,3.")],
    connect: Annotated[list[str] | None, typer.Option("--connect", help="HOST:PORT of a host; several times.")] = None,
    blocks: Annotated[str | None, typer.Option("--blocks", help="FIRST:STOP on hosts; all others are here.")] = None,
    new: Annotated[int, typer.Option("--new", "-n", help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    codec: Annotated[str, typer.Option("--codec", help="Of what is sent; most change words.")] = "identity",
    back_codec: Annotated[str, typer.Option("--back-codec", help="For what comes back.")] = "identity",
    weights: Annotated[Path | None, typer.Option("--weights", help="Safetensors elsewhere than in MODEL.")] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="Folder of `merak keys`.")] = None,
    name: Annotated[str, typer.Option("--name", help="This client's certificate in that folder.")] = "edge",
    insecure: Annotated[bool, typer.Option("--insecure", help="Everything in the clear, to whoever answers.")] = False,
    patience: Annotated[float, typer.Option("--patience", help="Seconds without a host for some blocks.")] = 60.0,
    device: Annotated[str, typer.Option("--device")] = "cpu",
) -> None:  # fmt: skip
    """Print each prompt with what follows it; on standard error one line of JSON: tokens, seconds, bytes, lost hosts.

    Hosts are `merak serve --generate`. Embedding, head and the choice of every token are here; without hosts all is.
    """
    from merak_like.runtime.sampling import Sampling
    from merak_like.split.blocks.generator import Generator
    from merak_like.split.tls import Keys

    words, prompts = _read(model, prompt)
    choose = Sampling(temperature, top_k, top_p, seed)
    with Generator(
        half_source(model, task="causal-lm" if Path(model).exists() else None, weights=weights),
        connect=connect or (), blocks=span(blocks, "--blocks") if blocks is not None else None,
        keys=Keys(keys, name) if keys is not None else None, insecure=insecure, codec=codec, back_codec=back_codec,
        patience=patience, device=device,
    ) as generator:  # fmt: skip
        began = time.monotonic()
        texts = generator.generate(prompts, max_new_tokens=new, end=words.end if words else None, sampling=choose)
        seconds = time.monotonic() - began
    for text in texts:
        typer.echo(words.decode(text) if words else ",".join(map(str, text)))
    made = sum(map(len, texts)) - sum(map(len, prompts))
    facts = {"tokens": made, "seconds": round(seconds, 3), "sent": generator.bytes["sent"],
             "received": generator.bytes["received"], "lost": generator.replaced}  # fmt: skip
    print(json.dumps(facts), file=sys.stderr)


def span(text: str, option: str) -> tuple[int, int]:
    """Read FIRST:STOP. Raises ValueError."""
    first, colon, stop = text.partition(":")
    if not (colon and first.isdigit() and stop.isdigit()):
        raise ValueError(f"{option} is FIRST:STOP, such as 0:6 for the first six blocks; found {text!r}")
    return int(first), int(stop)


def _read(model: str, prompts: list[str]) -> tuple[Tokenizer | None, list[list[int]]]:
    """Prompts as tokens, and the tokenizer if one was needed."""
    if all(part.strip().isdigit() for text in prompts for part in text.split(",")):
        return None, [[int(part) for part in text.split(",")] for text in prompts]
    from merak_like.hf.text import tokenizer

    words = tokenizer(Path(model))
    return words, words.encode(prompts)
