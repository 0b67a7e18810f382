"""Two clients fine-tune with one host, which is killed on the way. See README.md.

    python examples/split_finetune/main.py [FOLDER] [--steps 80] [--models bert gpt2]

Starts everything there is in such a system, as processes on this machine: keys of an authority of its own, a host whose
half of the model is a pipeline over two processes, and two edges over mutual TLS. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import texts  # noqa: E402
import torch  # noqa: E402

from merak_like.cli.edge_file import load, task_of  # noqa: E402
from merak_like.cli.halves import half_source  # noqa: E402
from merak_like.split.edge import Edge  # noqa: E402
from merak_like.split.leakage import leakage  # noqa: E402
from merak_like.split.tls import Keys  # noqa: E402

CLIENTS = ("ann", "bob")
RANK, WIDTH = 8, 64
CUTS = {"bert": "bert.encoder.layer.1@8:bert.pooler.dense", "gpt2": "transformer.h.1@8:transformer.ln_f"}
MERAK = (sys.executable, "-m", "merak_like.cli")
EDGE = """
model: {model}
data: texts:{model}_{client}
cut: {cut}
steps: {steps}
connect: 127.0.0.1:{port}
keys: keys
name: {client}
state: {model}-{client}
codec: aqsgd(4)|int4
back_codec: aqsgd(4)|int4
micro_batches: 2
checkpoint_every: 10
optimizer: {{name: adamw, lr: 0.003}}
"""


def make_model(name: str, folder: Path) -> None:
    """A small model of each kind, as a checkpoint: config.json and safetensors."""
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=texts.WORDS, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=4 * WIDTH, max_position_embeddings=texts.TOKENS,
            num_labels=len(texts.TOPICS),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    else:
        config = transformers.GPT2Config(
            vocab_size=texts.WORDS, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=texts.TOKENS, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)


@contextmanager
def host(folder: Path, model: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """Two processes under torchrun, which starts them again when one dies."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2", "--max-restarts=3", "-m", "merak_like.cli", "serve",
        "--model", model, "--cut", CUTS[model], "--listen", f"127.0.0.1:{port}", "--keys", "keys",
        "--state", f"{model}-host",
    ]  # fmt: skip
    with (folder / f"{model}-host.log").open("w") as log:
        agent = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, text=True)
    try:
        until(lambda: "listening" in (folder / f"{model}-host.log").read_text(), 180, "the host listens")
        yield agent
    finally:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.wait(90)
        finally:
            agent.kill()


def rank_0(agent: int) -> int:
    """The process of the first rank under an agent of torchrun, from what Linux tells of its children."""
    for children in Path(f"/proc/{agent}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    raise SystemExit("the host's first rank is not there")


def until(ready: Any, seconds: float, what: str) -> None:
    """Wait. Raises SystemExit saying what for."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s until {what}")
        time.sleep(0.2)


def told(path: Path) -> list[dict[str, Any]]:
    """The steps that an edge has printed so far."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def train(folder: Path, model: str, steps: int) -> list[dict[str, Any]]:
    """Both edges against one host, which loses its first rank to SIGKILL in the middle; a row for each edge."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for client in CLIENTS:
        text = EDGE.format(model=model, client=client, cut=CUTS[model], steps=steps, port=port)
        (folder / f"{model}-{client}.yaml").write_text(text)
    logs = {client: folder / f"{model}-{client}.log" for client in CLIENTS}
    with host(folder, model, port) as agent:
        edges = []
        for client, log in logs.items():
            command = [*MERAK, "edge", "train", f"{model}-{client}.yaml", "-o", f"{model}-{client}.safetensors"]
            with log.open("w") as out:
                edges.append(subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT))
        try:
            until(lambda: all(len(told(log)) > steps // 2 for log in logs.values()), 300, "half the steps are done")
            os.kill(rank_0(agent.pid), signal.SIGKILL)
            codes = [edge.wait(300) for edge in edges]
        finally:
            for edge in edges:
                edge.kill()
        if any(codes):
            raise SystemExit("\n".join(log.read_text()[-2000:] for log in logs.values()))
        return [row(folder, model, client, told(logs[client])) for client in CLIENTS]


def row(folder: Path, model: str, client: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What an edge's training came to; goes on with its session to ask the model about texts nobody trained on."""
    setting = load(folder / f"{model}-{client}.yaml")
    source, task = half_source(setting.model, task=None, weights=None), task_of(setting)
    data = getattr(texts, f"{model}_{client}")
    right = asked = 0
    with Edge(source, task, data(0)[0], connect=setting.connect, folder=setting.state,
              keys=Keys(folder / "keys", client)) as edge:  # fmt: skip
        for batch in texts.unseen(classify=model == "bert"):
            found = edge.predict(batch)["logits"].argmax(-1)
            due = batch["labels"] if model == "bert" else batch["labels"][:, 1:]
            found = found if model == "bert" else found[:, :-1]
            right, asked = right + int((found == due).sum()), asked + due.numel()
    again = len(lines) - len({line["step"] for line in lines})
    last = [line["sent"] + line["received"] for line in lines[-2:]]
    leak = leakage(source, task, [data(step) for step in range(8)], steps=200)
    plain = 4 * texts.BATCH * texts.TOKENS * WIDTH * 4  # two links, two ways, float32
    if model == "bert":
        plain = 2 * texts.BATCH * (texts.TOKENS + 1) * WIDTH * 4  # one row a sample comes back
    return {
        "model": model, "client": client, "done again": again, "loss": (lines[0]["loss"], lines[-1]["loss"]),
        "accuracy": right / asked, "bytes": last[1] - last[0], "fewer": plain / (last[1] - last[0]),
        "recovered": leak.recovered, "majority": leak.majority,
    }  # fmt: skip


def main() -> None:
    """Do it all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where everything is kept; else it is thrown away")
    parser.add_argument(
        "--steps", type=int, default=80, help="best a multiple of 10, where both sides write checkpoints"
    )
    parser.add_argument("--models", nargs="+", choices=list(CUTS), default=list(CUTS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "texts.py").write_text((HERE / "texts.py").read_text())
        for command in (["init"], ["issue", "host", "--host", "127.0.0.1"], *(["issue", client] for client in CLIENTS)):
            subprocess.run([*MERAK, "keys", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        print(
            "| model | client | loss, first and last step | accuracy, unseen | bytes a step, both ways | times fewer |"
            " steps done again | tokens a decoder finds (always the most frequent) |\n"
            "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |"
        )
        for model in args.models:
            make_model(model, folder / model)
            for one in train(folder, model, args.steps):
                print(
                    f"| {one['model']} | {one['client']} | {one['loss'][0]:.2f}, {one['loss'][1]:.2f} | "
                    f"{one['accuracy']:.1%} | {one['bytes']:,} | {one['fewer']:.1f} | {one['done again']} | "
                    f"{one['recovered']:.1%} ({one['majority']:.1%}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
