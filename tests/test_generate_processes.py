"""Text through hosts in processes of their own, killed in the middle, as people start them, and of other families."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like.split.blocks.generator import Generator
from tests import split_models
from tests.split_process import Nursery
from tests.test_generate import NEW, prompts_of, said, source_of

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.ranks
@pytest.mark.parametrize("fault", ["computed", pytest.param("answered", marks=pytest.mark.slow)])
def test_a_host_killed_in_the_middle_changes_nothing(fault: str, tmp_path: Path):
    """SIGKILL between two tokens: once with the pass computed and not answered, once with the answer under way."""
    model = split_models.gpt2()[0].eval()
    prompts = prompts_of(5, 9)
    with Nursery() as nursery:
        first = nursery.start("blocks", folder=str(tmp_path / "a"), first=0, stop=2)
        doomed = nursery.start("blocks", folder=str(tmp_path / "b"), first=2, stop=4, fault=fault, at=6)
        spare = nursery.start("blocks", folder=str(tmp_path / "c"), first=1, stop=4)
        connect = [f"127.0.0.1:{host['port']}" for host in (first, doomed, spare)]
        with Generator(source_of(model), connect=connect, patience=20) as remote:
            assert remote.generate(prompts, max_new_tokens=NEW) == said(model, prompts)
            assert [str(doomed["port"]) in why for why in remote.replaced] == [True]
        assert nursery.wait(doomed["pid"])["status"] == -signal.SIGKILL


FAMILIES = {
    "qwen2": "Qwen2", "mistral": "Mistral", "gemma": "Gemma", "gpt_neox": "GPTNeoX", "phi": "Phi", "opt": "OPT",
    "mixtral": "Mixtral", "qwen3": "Qwen3", "olmo2": "Olmo2", "falcon": "Falcon", "gemma3_text": "Gemma3Text",
    "stablelm": "StableLm", "granite": "Granite", "starcoder2": "Starcoder2", "cohere": "Cohere", "gptj": "GPTJ",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families(kind: str):
    """Logits through the cache against those of the whole text without one, padding in front of one of two texts."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 100, "head_dim": 8, "max_position_embeddings": 64,
             "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
             "n_positions": 64, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2}  # fmt: skip
    config = transformers.CONFIG_MAPPING[kind]()
    config = type(config)(**{k: v for k, v in sizes.items() if k in config.to_dict()})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    with Generator(source_of(model)) as local:
        texts = local.generate(prompts, max_new_tokens=10)
        with torch.no_grad():
            for text, prompt in zip(texts, prompts, strict=True):
                whole = model(input_ids=torch.tensor([text[:-1]]), use_cache=False).logits[0]
                assert whole.argmax(-1)[len(prompt) - 1 :].tolist() == text[len(prompt) :]


@pytest.mark.ranks
def test_as_people_type_it(tmp_path: Path):
    """Two `merak serve --generate` from one checkpoint, and `merak generate` that dials both."""
    model: Any = split_models.gpt2()[0].eval()
    model.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    merak = [sys.executable, "-m", "merak_like.cli"]
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(subprocess.Popen(
                [*merak, "serve", "--model", "model", "--generate", span, "--listen", "127.0.0.1:0",
                 "--state", span[0]], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
            ))
            for span in ("0:2", "2:4")
        ]  # fmt: skip
        try:
            lines = [host.stdout.readline() for host in hosts if host.stdout is not None]
            ports = [re.findall(r":(\d+)", line)[0] for line in lines]
            connect = [word for port in ports for word in ("--connect", f"127.0.0.1:{port}")]
            run = subprocess.run(
                [*merak, "generate", "--model", "model", "-p", "5,6,7", "-n", "6", *connect],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
            )  # fmt: skip
            assert run.returncode == 0, run.stderr
            assert run.stdout.split() == [",".join(map(str, said(model, [[5, 6, 7]], max_new_tokens=6)[0]))]
            facts = json.loads(run.stderr.splitlines()[-1])
            assert facts["tokens"] == 6
            assert facts["lost"] == []
        finally:
            for host in hosts:
                host.send_signal(signal.SIGTERM)
        assert [host.wait(30) for host in hosts] == [0, 0]
