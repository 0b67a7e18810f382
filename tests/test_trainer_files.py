"""Data from files: token files, texts, classes; what cannot be read is named; where numbers go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from merak_like.trainer.config import Data
from merak_like.trainer.data import files
from merak_like.trainer.data.build import datasets, split
from merak_like.trainer.data.tokens import TokenFile, write_tokens
from merak_like.trainer.journal import Journal
from merak_like.trainer.settings import Logging
from merak_like.trainer.trackers import TRACKERS


def test_token_files_are_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    assert write_tokens([[1, 2, 3, 0], [4, 5, 0], [6]], path, 100) == 8
    file = TokenFile(path, 3, end=0)
    assert np.load(path).dtype == np.uint16
    assert isinstance(file.tokens, np.memmap)
    assert [file[i].tolist() for i in range(len(file))] == [[1, 2, 3], [0, 4, 5]]
    batch = file.collate([file[0], file[1]])
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    with pytest.raises(ValueError, match="8 tokens, fewer than one row of 9"):
        TokenFile(path, 9)
    with pytest.raises(ValueError, match=r"tokens 1 to 70000 do not fit a vocabulary of 100"):
        write_tokens([[1, 70000]], tmp_path / "wrong.npy", 100)
    assert not (tmp_path / "wrong.npy").exists()
    (tmp_path / "no.npy").write_text("no")
    with pytest.raises(ValueError, match="is not a token file"):
        TokenFile(tmp_path / "no.npy", 3)


class Words:
    """A tokenizer: a letter is a token."""

    end, pad, vocabulary = 0, 0, 128
    inner = type("Inner", (), {"name_or_path": "letters"})

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    def whole(self, texts: list[str], most: int) -> list[dict[str, Any]]:
        return [{"input_ids": ids[:most]} for ids in self.encode(texts)]


def read(asked: Data, cache: Path) -> Any:
    return datasets(asked, Words, seed=0, cache=cache, lead=True, timeout=5)  # type: ignore[arg-type]


def lines(path: Path, *records: Any) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_texts_become_packed_documents(tmp_path: Path) -> None:
    made = read(Data(train=lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "defg"}), seq=10), tmp_path / "cache")
    ids, document = made.train[0]
    assert bytes(ids.tolist()) == b"abc\0defg\0\0"
    assert document.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, -1]
    (tmp_path / "cache/marker").touch()
    again = read(Data(train=str(tmp_path / "a.jsonl"), seq=10), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("tokens-*.npy"))) == 2  # tokens and ends, written once
    assert torch.equal(again.train[0][0], ids)
    stream = read(Data(train=str(tmp_path / "a.jsonl"), seq=3, packing="stream"), tmp_path / "cache").train
    assert [bytes(stream[i].tolist()) for i in range(3)] == [b"abc", b"\0de", b"fg\0"]
    off = read(Data(train=str(tmp_path / "a.jsonl"), seq=3, packing="off"), tmp_path / "cache")
    assert off.collate([off.train[0], off.train[1]])["input_ids"].shape == (2, 8)


def test_text_files_are_documents_and_classes_are_numbered(tmp_path: Path) -> None:
    for name in ("one.txt", "two.md"):
        (tmp_path / name).write_text(name)
    assert len(read(Data(train=str(tmp_path)), tmp_path / "cache").train.documents) == 2
    records = [{"text": "aa", "kind": "law"}, {"text": "bb", "kind": "art"}, {"text": "cc", "kind": "law"}]
    made = read(Data(train=lines(tmp_path / "c.jsonl", *records), label="kind"), tmp_path)
    assert made.classes == ("art", "law")
    assert [sample["labels"] for sample in made.train] == [1, 0, 1]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.jsonl", {"txt": "a"})
    for asked, words in (
        (Data(train=str(tmp_path / "god.jsonl")), "perhaps 'good.jsonl'"),
        (Data(train=good), "data.text = 'text', but records have txt, perhaps txt"),
        (Data(train=good, text="txt", label="kind"), "data.label = 'kind', but records have txt"),
        (Data(train=str(tmp_path / "*.unknown")), "no file"),
    ):
        with pytest.raises(ValueError, match=words):
            read(asked, tmp_path / "cache")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: not JSON"):
        read(Data(train=str(tmp_path / "bad.jsonl")), tmp_path / "cache")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"whose format is not clear: say data.format"):
        files.found(str(tmp_path / "x.csv"), "auto")


def test_a_share_is_kept_for_evaluation_the_same_every_time() -> None:
    data = list(range(50))
    train, held = split(data, 0.2, 3)
    assert sorted([train[i] for i in range(40)] + [held[i] for i in range(10)]) == data
    assert [held[i] for i in range(10)] == [split(data, 0.2, 3)[1][i] for i in range(10)]
    with pytest.raises(ValueError, match="leaves one side empty"):
        split(data, 0.001, 0)


def test_a_missing_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(ValueError, match=r"these files need pyarrow: pip install 'merak-like\[data\]'"):
        list(files.records([tmp_path / "a.parquet"], "parquet"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging.trackers has 'wandb', but .*: pip install wandb, or leave it out"):
        TRACKERS["wandb"](tmp_path, "project", {})


def test_parquet_and_saved_datasets_are_read(tmp_path: Path) -> None:
    """Where their packages are."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"text": "abc", "kind": "law"}, {"text": "defg", "kind": "art"}]
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "a.parquet")
    made = read(Data(train=str(tmp_path / "a.parquet"), seq=10), tmp_path / "cache")
    assert bytes(made.train[0][0].tolist()) == b"abc\0defg\0\0"
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="one").save_to_disk(str(tmp_path / "saved"))
    for asked in ("auto", "datasets"):
        made = read(Data(train=str(tmp_path / "saved"), format=asked, label="kind"), tmp_path / "cache")
        assert (made.classes, [sample["labels"] for sample in made.train]) == (("art", "law"), [1, 0])


def test_tensorboard_reads_what_is_logged(tmp_path: Path) -> None:
    """Where it is installed."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, end = TRACKERS["tensorboard"](tmp_path, "project", {})
    log({"loss": 2.5, "epoch": 1}, 3)
    end()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(one.step, one.value) for one in found] == [(3, 2.5)]


def test_a_tracker_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which is not installed everywhere: names and steps arrive, and it is closed."""
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    journal = Journal(tmp_path, Logging(console=False, trackers=("tensorboard",)), {}, 5, lead=True)
    journal.start(0)
    journal.write(3, {"loss": 1.5})
    journal.close()
    assert seen == [str(tmp_path / "tensorboard"), ("loss", 1.5, 3), "closed"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.5
