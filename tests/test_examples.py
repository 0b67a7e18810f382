"""Examples are short and run, and a scheduler's file starts the ranks that it asks for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.run import get_args_parser
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from tests.commands import run as command

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "examples/cluster"
SHORT = (
    "pretrain",
    "finetune_minilm",
    "lora",
    "own_model",
    "hf_trainer",
    "cluster/multi_node.sh",
    "cluster/slurm.sbatch",
)
RECORD = """#!{python}
import json, sys
from pathlib import Path
Path({said!r}).write_text(json.dumps(sys.argv[1:]))
"""
EVERY_ARGUMENT = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
"""In place of srun: leave its own options out and run the command here."""


def shim(folder: Path, name: str, text: str) -> None:
    """A program of that name."""
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The environment of a node with eight devices; ``python`` notes what it is asked to do.

    ``scontrol`` says more than a pipe holds, as long lists of nodes do.
    """
    shim(tmp_path, "scontrol", "#!/bin/sh\necho node-a\nseq -f node-b%g 20000\n")
    shim(tmp_path, "srun", EVERY_ARGUMENT)
    shim(tmp_path, "python", RECORD.format(python=sys.executable, said=str(tmp_path / "said.json")))
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    return os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "1"}


def launched(words: list[str], environment: dict[str, str], folder: Path) -> Any:
    """What torchrun understands of the command that a shell comes to."""
    subprocess.run(words, env=environment, check=True, timeout=60, cwd=folder)
    first, module, *rest = json.loads((folder / "said.json").read_text())
    assert (first, module) == ("-m", "torch.distributed.run")
    return get_args_parser().parse_args(rest)


def kubernetes() -> tuple[Any, Any]:
    """The service and the job."""
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    return service, job


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short(name: str) -> None:
    path = ROOT / "examples" / (name if "." in name else f"{name}.py")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_slurm_starts_an_agent_for_each_node(node: dict[str, str], tmp_path: Path) -> None:
    script = str(CLUSTER / "slurm.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    asked = launched(["bash", script, "run.yaml", "training.steps=3"], node, tmp_path)
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_id) == ("2", "8", "7")
    assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "node-a:29500")
    assert (asked.module, asked.training_script) == (True, "merak_like.cli")
    assert asked.training_script_args == ["train", "run.yaml", "training.steps=3"]
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", Path(script).read_text(), re.MULTILINE))
    assert (directives["nodes"], directives["ntasks-per-node"], directives["gpus-per-node"]) == ("2", "1", "8")


def test_machines_by_hand_meet_at_the_first(node: dict[str, str], tmp_path: Path) -> None:
    script = str(CLUSTER / "multi_node.sh")
    subprocess.run(["bash", "-n", script], check=True)
    asked = launched(["bash", script, "2", "1", "10.0.0.1", "run.yaml"], node, tmp_path)
    assert (asked.nnodes, asked.node_rank, asked.nproc_per_node) == ("2", 1, "gpu")
    assert (asked.master_addr, asked.master_port) == ("10.0.0.1", 29500)
    assert (asked.training_script, asked.training_script_args) == ("merak_like.cli", ["train", "run.yaml"])


def test_kubernetes_starts_pods_that_find_each_other(node: dict[str, str], tmp_path: Path) -> None:
    service, job = kubernetes()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    asked = launched([*container["command"], *container["args"]], node, tmp_path)
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert int(asked.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(asked.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert asked.node_rank == 1
    name = job["metadata"]["name"]  # an indexed job's pods are called NAME-INDEX, below the subdomain
    assert service["spec"]["selector"] == {"job-name": name}
    assert asked.master_addr == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert asked.training_script_args == ["train", "/runs/run.yaml"]


@pytest.mark.slow
def test_file_that_they_run_is_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of a run, on the ranks of the templates: sixteen, of which none is here."""
    file, folder = ROOT / "examples/run.yaml", tmp_path / "run"
    changes = [f"folder={folder}", "parallelism.dp=4", "parallelism.pp=4", "training.batch=64", "data.seq=16",
               "parallelism.hardware=a100-80gb"]  # fmt: skip
    said = command(capsys, "train", str(file), *changes, "--dry-run")
    assert "is in order: 16 ranks, 64 samples a step" in said
    assert (folder / "plan.json").exists()


# --- slowly: they run ------------------------------------------------------------------------------------------------


def python(*words: str, folder: Path, ranks: int = 1, **more: str) -> str:
    """Run a script on so many ranks; what it says."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    done = subprocess.run(
        [sys.executable, *launch[: 5 * (ranks > 1)], *words], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def saved(folder: Path, model: Any) -> Path:
    """A small model with a tokenizer for ``words``, as ``from_pretrained`` finds it."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", "a", "b"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    Fast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_own_model_and_pretraining_run(ranks: int, tmp_path: Path) -> None:
    pp = ("--pp", str(ranks))
    python(str(ROOT / "examples/own_model.py"), "--steps", "5", *pp, folder=tmp_path, ranks=ranks)
    assert (tmp_path / "runs/own-model/metrics.jsonl").exists()
    python(str(ROOT / "examples/pretrain.py"), "--steps", "3", *pp, folder=tmp_path, ranks=ranks)
    assert (tmp_path / "runs/pretrain/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_lora_and_fine_tuning_run(tmp_path: Path) -> None:
    """With small models of the same kinds in the place of those that people download."""
    llama = saved(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=256, **SMALL)))
    lines = [json.dumps({"text": " ".join("ab"[(i + j) % 2] for j in range(300))}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    python(str(ROOT / "examples/lora.py"), str(llama), "texts.jsonl", "--steps", "2", folder=tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "runs/lora/merged").config.vocab_size == 8
    bert = BertModel(BertConfig(vocab_size=8, max_position_embeddings=64, **SMALL))  # as MiniLM: no classifier yet
    folder = saved(tmp_path / "bert", bert)
    python(str(ROOT / "examples/finetune_minilm.py"), str(folder), "--steps", "2", "--each", "4", folder=tmp_path)
    found = BertForSequenceClassification.from_pretrained(tmp_path / "runs/minilm/model")
    assert found.config.num_labels == 10


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_script_for_transformers_trainer_runs(tmp_path: Path) -> None:
    python(str(ROOT / "examples/hf_trainer.py"), folder=tmp_path, ranks=4)
    assert (tmp_path / "runs/hf-trainer/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_slurm_file_trains(node: dict[str, str], tmp_path: Path) -> None:
    """One node with two devices, which are processes here: the file as it is, from srun's command on."""
    shim(tmp_path, "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    shim(tmp_path, "scontrol", "#!/bin/sh\necho 127.0.0.1\n")
    here = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    changes = ["parallelism.pp=2", "training.steps=2", "data.seq=16", "parallelism.device=cpu"]
    words = ["bash", str(CLUSTER / "slurm.sbatch"), str(ROOT / "examples/run.yaml"), *changes]
    done = subprocess.run(
        words, env=node | here | {"CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "runs/synthetic/model/model.safetensors").exists()
