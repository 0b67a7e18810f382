"""What the documents tell people to copy does run: every Python block, on as many ranks as the document says.

A block stands alone unless the comment before it says otherwise: ``<!-- run with 2 ranks -->``, or ``<!-- goes on -->``
where it continues the block before it. ``<!-- file NAME -->`` makes a block of any language a file for the shell blocks
behind it that say ``<!-- run -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ("quick-start", "own-model", "fine-tune", "multi-node", "trainer", "errors")
DOCUMENTS = ("README.md", "docs/training.md", "docs/quick-start.md", "docs/trainer.md", "docs/own-model.md",
             "docs/checkpoints.md", "docs/split.md", "docs/methods.md", "docs/deepspeed.md", "docs/schedules.md",
             "docs/tensor-parallel.md", "docs/codecs.md")  # fmt: skip
BLOCK = re.compile(r"^(?:<!-- (?P<word>[^\n]*?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


LINKED = sorted(
    {*DOCUMENTS, *(f"docs/{page}.md" for page in SITE), "docs/plan.md", "docs/install.md"}
    | {"CONTRIBUTING.md", "ARCHITECTURE.md"}
)
FENCED = re.compile(r"^<!-- (?P<word>file|run)(?P<more>.*?) -->\n```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


class Script(NamedTuple):
    """Blocks that run together."""

    line: int
    ranks: int
    code: str


def scripts(text: str) -> list[Script]:
    """The scripts of a document. Raises ValueError for a comment that means nothing, or nothing to continue."""
    found: list[Script] = []
    for block in BLOCK.finditer(text):
        word, line = block["word"] or "run with 1 rank", text.count("\n", 0, block.start("code"))
        if word.startswith("file "):
            continue
        if word == "goes on":
            last = found.pop()
            found.append(last._replace(code=f"{last.code}\n{block['code']}"))
        elif ranks := re.fullmatch(r"run with (\d+) ranks?", word):
            found.append(Script(line, int(ranks[1]), block["code"]))
        else:
            raise ValueError(f"line {line}: what does {word!r} mean?")
    return found


def cases() -> list[object]:
    """Every script of every document; of those on several ranks the first of each document, the others slowly."""
    found: list[object] = []
    for document in DOCUMENTS:
        on_ranks = 0
        for script in scripts((ROOT / document).read_text(encoding="utf-8")):
            on_ranks += script.ranks > 1
            marks = [pytest.mark.ranks] * (script.ranks > 1) + [pytest.mark.slow] * (script.ranks > 1 and on_ranks > 1)
            found.append(pytest.param(script, id=f"{document}:{script.line}", marks=marks))
    return found


HOST = """
import os, runpy, sys
import torch, transformers
import merak_like.api, merak_like.hf, merak_like.trainer.run

for line in sys.stdin:
    script = line.strip()
    child = os.fork()
    if not child:
        os.chdir(os.path.dirname(script))
        out = os.open("said", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs scripts one after the other, each in a process of its own that has not to import torch again."""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Iterator[subprocess.Popen[str]]:
    """What runs the scripts of one rank."""
    run = subprocess.Popen([sys.executable, "-c", HOST], env=ENVIRONMENT, stdin=PIPE, stdout=PIPE, text=True)
    yield run
    run.kill()
    run.wait()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", cases())
def test_code_of_the_documents_runs(script: Script, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "train.py").write_text(script.code, encoding="utf-8")
    if script.ranks == 1:
        one: subprocess.Popen[str] = request.getfixturevalue("host")
        assert one.stdin is not None
        assert one.stdout is not None
        print(tmp_path / "train.py", file=one.stdin, flush=True)
        code = one.stdout.readline().strip()
        assert code == "0", f"{script.code}\n{(tmp_path / 'said').read_text()[-6000:]}"
        return
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(script.ranks)]
    run = subprocess.run(
        [sys.executable, *launch, "train.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, f"{script.code}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"


class Commands(NamedTuple):
    """A shell block, and the files it may read."""

    line: int
    ranks: int
    code: str
    files: dict[str, str]


def commands(text: str) -> list[Commands]:
    """The shell blocks of a document that are to be run."""
    files: dict[str, str] = {}
    found: list[Commands] = []
    for block in FENCED.finditer(text):
        if block["word"] == "file":
            files[block["more"].strip()] = block["code"]
        elif block["kind"] == "sh":
            ranks = re.search(r"with (\d+) ranks", block["more"])
            line = text.count("\n", 0, block.start("code"))
            found.append(Commands(line, int(ranks[1]) if ranks else 1, block["code"], dict(files)))
    return found


def shell_cases() -> list[object]:
    """Every shell block of the site."""
    return [
        pytest.param(
            one,
            id=f"docs/{page}.md:{one.line}",
            marks=[pytest.mark.ranks] * (one.ranks > 1) + [pytest.mark.slow] * (page != "quick-start"),
        )
        for page in SITE
        for one in commands((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", shell_cases())
def test_commands_of_the_documents_run(block: Commands, tmp_path: Path) -> None:
    for name, content in block.files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    begin = f'python() {{ {sys.executable} "$@"; }}\nmerak() {{ python -m merak_like.cli "$@"; }}\n'
    run = subprocess.run(
        ["bash", "-euc", begin + block.code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, f"{block.code}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"


def test_no_document_is_left_out() -> None:
    """Those with code; ARCHITECTURE.md has a drawing of a call, and docs/codecs.md is run by test_codecs_page."""
    files = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    with_code = {str(file.relative_to(ROOT)) for file in files if "```python" in file.read_text(encoding="utf-8")}
    assert with_code == {*DOCUMENTS, "ARCHITECTURE.md", "docs/codecs.md"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_is_left_out(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert text.count("```python") == sum(1 for _ in BLOCK.finditer(text)) > 0


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_somewhere(document: str) -> None:
    file = ROOT / document
    prose = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)", prose)
    missing = [target for target in targets if "://" not in target and not (file.parent / target).exists()]
    assert not missing


def test_blocks_are_found_joined_and_counted() -> None:
    text = (
        "```python\na\n```\n<!-- run with 2 ranks -->\n```python\nb\n```\ntext\n\n<!-- goes on -->\n```python\nc\n```\n"
    )
    assert scripts(text) == [Script(1, 1, "a\n"), Script(5, 2, "b\n\nc\n")]
    with pytest.raises(ValueError, match="what does 'perhaps' mean"):
        scripts("<!-- perhaps -->\n```python\na\n```\n")


@pytest.mark.timeout(300)
def test_site_is_built_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pages were in no list of contents, and nothing had built the site to say so."""
    for package in ("furo", "myst_parser"):
        pytest.importorskip(package)
    build = pytest.importorskip("sphinx.cmd.build")
    folders = [str(ROOT / "docs"), str(tmp_path / "site")]
    assert build.main(["-q", "-W", "--keep-going", "-d", str(tmp_path / "trees"), *folders]) == 0, (
        capsys.readouterr().err
    )
    assert "auto_parallel" in (tmp_path / "site/api.html").read_text(encoding="utf-8")
