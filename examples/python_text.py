"""The text of train_gpt2.py: Python's own documentation, which is wherever Python is, as rows of token numbers."""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY, CONTEXT = 2048, 128
TESTS = {"test", "tests", "site-packages", "dist-packages"}
"""Folders of the standard library whose docstrings are not documentation, or not its own."""


def documents() -> Iterator[str]:
    """The chapters of the language reference, then for each module of the standard library its docstrings."""
    yield from (text for _, text in sorted(topics.items()))
    library = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(library.rglob("*.py")):
        if not TESTS & set(file.relative_to(library).parts):
            nodes = ast.walk(ast.parse(file.read_bytes()))
            yield "\n\n".join(filter(None, (ast.get_docstring(n) for n in nodes if isinstance(n, documented))))


def prepare(folder: Path) -> None:
    """Train a tokenizer on the text and write it, with the text as rows of token numbers, to a new folder."""
    texts = [text for text in documents() if len(text) > 200]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    rows: dict[str, list[int]] = {"train": [], "valid": []}
    for number, encoded in enumerate(bpe.encode_batch(texts)):  # whole documents: no sentence is on both sides
        rows["valid" if number % 10 == 0 else "train"] += [*encoded.ids, bpe.token_to_id(END)]
    half_made = folder.with_name(f"{folder.name}.{os.getpid()}")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END).save_pretrained(half_made)
    tensors = {name: torch.tensor(ids) for name, ids in rows.items()}
    torch.save({n: t[: len(t) // CONTEXT * CONTEXT].view(-1, CONTEXT) for n, t in tensors.items()}, half_made / "rows")
    half_made.rename(folder)  # all at once: a folder that is there is whole


def prepared(runs: Path, rank: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of the tokenizer, and rows for training and validation.

    The first rank makes them, unless an earlier run did; the others wait for the folder.
    """
    folder = runs / f"python-{sys.version_info[0]}.{sys.version_info[1]}-{VOCABULARY}x{CONTEXT}"
    if rank == 0 and not folder.exists():
        runs.mkdir(parents=True, exist_ok=True)
        prepare(folder)
    while not folder.exists():  # should the first rank fail, torchrun ends this one
        time.sleep(0.1)
    return folder, torch.load(folder / "rows")
