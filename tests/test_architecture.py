"""The house rules of ARCHITECTURE.md, read from the source: who imports whom, one door per heavy package, small files.

A rule is a function from (path, source) to complaints, so each is shown here to complain about a snippet that breaks it
and to keep quiet about one that does not. Paths are relative to merak_like/.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import merak_like

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "merak_like"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

LINES = 300
MOST_LINES = 350
LONGER = dict[str, str]()  # file -> why it is one noun in spite of having 301 to 350 lines
NO_TORCH = (
    "partitioner/schedules/*",
    "partitioner/report/*",
    "partitioner/explain/*",
    *(f"partitioner/{f}.py" for f in ("basis", "graph", "mesh", "plan", "sharding")),
)
ABOVE = r"merak_like\.(api|cli|ds_config|trainer|split|hf)(\..*)?"


class Names(NamedTuple):
    """May not be named: dotted names that match ``forbidden``, in files that match ``where`` but not ``door``."""

    forbidden: str
    where: tuple[str, ...] = ("*",)
    door: tuple[str, ...] = ()

    def __call__(self, path: str, source: str) -> list[str]:
        if not any(fnmatch(path, w) for w in self.where) or any(fnmatch(path, d) for d in self.door):
            return []
        used = dotted_names(source)
        return [f"{path}:{line} names {name}" for name, line in used if re.fullmatch(self.forbidden, name)]


parsed = cache(ast.parse)
"""Every rule looks at every file."""


@cache
def dotted_names(source: str) -> list[tuple[str, int]]:
    """Every dotted name a file imports or spells, aliases undone: ``F.relu`` is ``torch.nn.functional.relu``."""
    tree = parsed(source)
    imported: list[tuple[str, int]] = []
    meaning: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported.append((alias.name, node.lineno))
                root = alias.name.split(".")[0]
                meaning[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            imported.append((module, node.lineno))
            for alias in node.names:
                imported.append((f"{module}.{alias.name}", node.lineno))
                meaning[alias.asname or alias.name] = f"{module}.{alias.name}"
    spelled = [(spell(node, meaning), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted({*imported, *spelled}, key=lambda found: found[1])


def spell(node: ast.expr, meaning: dict[str, str]) -> str:
    """The dotted name of an attribute; ``?`` stands for what is not a name, as in ``f().new_group``."""
    if isinstance(node, ast.Attribute):
        return f"{spell(node.value, meaning)}.{node.attr}"
    return meaning.get(node.id, "?") if isinstance(node, ast.Name) else "?"


def package(name: str) -> str:
    """A pattern for a package and everything in it."""
    return rf"{re.escape(name)}(\..*)?"


def is_small(path: str, source: str) -> list[str]:
    """A file over 300 lines is two nouns, unless LONGER says why not; none goes over 350."""
    lines = len(source.splitlines())
    allowed = MOST_LINES if path in LONGER else LINES
    return [f"{path} has {lines} lines, more than {allowed}: split it, one noun a file"] * (lines > allowed)


def has_own_name(path: str, source: str) -> list[str]:
    """A file named as a standard module shadows it as soon as its folder is on the path."""
    return [f"{path} is named as a module of the standard library"] * (Path(path).stem in sys.stdlib_module_names)


def has_no_global(path: str, source: str) -> list[str]:
    """State is passed, not fetched."""
    return [f"{path}:{n.lineno} has a global" for n in ast.walk(parsed(source)) if isinstance(n, ast.Global)]


def is_documented(path: str, source: str) -> list[str]:
    """A module, and its public functions and classes, say what they are."""
    tree = parsed(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    missing = [f"{path}:{n.lineno} {n.name} has no docstring" for n in public if not ast.get_docstring(n)]
    return [f"{path} has no docstring"] * (not ast.get_docstring(tree)) + missing


def is_portable(path: str, source: str) -> list[str]:
    """No path of somebody's machine stands in the package."""
    roots = "data|home|mnt|opt|root|scratch|srv|tmp|usr/local|work|Users"
    found = re.finditer(rf"(?<![\w./:-])(/({roots})/|[A-Z]:\\\\?)\w+", source)
    return [f"{path} has the machine path {match[0]}" for match in found]


Rule = Callable[[str, str], list[str]]
RULES: dict[str, Rule] = {
    "imports are absolute": Names(r"\..*"),
    "the top-level links are not imported": Names(r"(partitioner|runtime)(\..*)?"),
    "the package imports from modules, not from its own front": Names(rf"merak_like\.({'|'.join(merak_like.PUBLIC)})"),
    "partitioner knows nothing above it": Names(rf"{ABOVE}|{package('merak_like.runtime')}", ("partitioner/*",)),
    "partitioner starts no processes": Names(package("torch.distributed"), ("partitioner/*",)),
    "runtime knows nothing above it": Names(ABOVE, ("runtime/*",)),
    "schedules, plan, mesh, graph and report do without torch": Names(package("torch"), NO_TORCH),
    "transformers has one door": Names(
        rf"{package('transformers')}|{package('accelerate')}|{package('peft')}", door=("hf/*",)
    ),
    "torch.fx has its doors": Names(
        package("torch.fx"),
        door=("partitioner/tracer/*", "runtime/stage_code.py", "runtime/value_code.py", "runtime/tensor_parallel/*"),
    ),
    "deepspeed has one door": Names(package("deepspeed"), door=("runtime/deepspeed_zero.py",)),
    "bitsandbytes has one door": Names(package("bitsandbytes"), door=("runtime/four_bit.py",)),
    "liger has one door": Names(package("liger_kernel"), door=("runtime/methods/liger.py",)),
    "cryptography has one door": Names(package("cryptography"), door=("split/keys.py",)),
    "grpc has one door": Names(package("grpc"), door=("split/calls.py",)),
    "matplotlib has one door": Names(package("matplotlib"), door=("*/report/*",)),
    "the environment has one reader": Names(
        r"os\.(environb?|getenvb?|putenv|unsetenv)(\..*)?", door=("runtime/initialize.py",)
    ),
    "process groups have one maker": Names(r".*\bnew_(sub)?groups?(_by_enumeration)?", door=("runtime/groups.py",)),
    # A component with one underscore in front; a dunder such as torch.__version__ is public.
    "torch's private names have one door": Names(r"torch\.(.*\.)?_(?!_).*", door=("_compat.py",)),
    "files are small": is_small,
    "files are not named as standard modules": has_own_name,
    "nothing is global": has_no_global,
    "what is public is documented": is_documented,
    "no machine paths": is_portable,
}


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps_the_rule(rule: str):
    complaints = [complaint for path, source in SOURCES.items() for complaint in RULES[rule](path, source)]
    assert not complaints, f"{rule}:\n" + "\n".join(complaints)


GUILTY = [
    ("imports are absolute", "api.py", "from .partitioner import plan"),
    ("imports are absolute", "api.py", "from . import hf"),
    ("the top-level links are not imported", "api.py", "from runtime.engine import Engine"),
    ("the top-level links are not imported", "cli/show.py", "import partitioner"),
    ("the package imports from modules, not from its own front", "cli/show.py", "from merak_like import Plan"),
    ("partitioner knows nothing above it", "partitioner/planner.py", "from merak_like.runtime import engine"),
    ("partitioner knows nothing above it", "partitioner/schedules/gpipe.py", "from merak_like import runtime"),
    ("partitioner knows nothing above it", "partitioner/planner.py", "def f():\n    import merak_like.cli.show"),
    ("partitioner starts no processes", "partitioner/cost.py", "import torch\ntorch.distributed.barrier()"),
    ("partitioner starts no processes", "partitioner/cost.py", "from torch import distributed as dist"),
    ("runtime knows nothing above it", "runtime/engine.py", "from merak_like.hf import loss"),
    ("runtime knows nothing above it", "runtime/codecs/int8.py", "from merak_like import split"),
    ("schedules, plan, mesh, graph and report do without torch", "partitioner/schedules/gpipe.py", "import torch"),
    ("schedules, plan, mesh, graph and report do without torch", "partitioner/plan.py", "from torch import Tensor"),
    ("transformers has one door", "trainer/data.py", "from transformers import AutoTokenizer"),
    ("torch.fx has its doors", "partitioner/cuts.py", "from torch.fx import Graph"),
    ("torch.fx has its doors", "runtime/stage.py", "import torch\ngraph: torch.fx.Graph"),
    ("deepspeed has one door", "runtime/engine.py", "import deepspeed.comm as comm"),
    ("bitsandbytes has one door", "hf/lora.py", "from bitsandbytes import functional"),
    ("liger has one door", "runtime/methods/head_loss.py", "import liger_kernel.transformers"),
    ("cryptography has one door", "split/tls.py", "from cryptography import x509"),
    ("grpc has one door", "runtime/links.py", "import grpc"),
    ("matplotlib has one door", "cli/show.py", "import matplotlib.pyplot as plt"),
    ("the environment has one reader", "cli/train.py", "from os import environ"),
    ("the environment has one reader", "cli/train.py", "import os\nos.environ.get('RANK')"),
    ("the environment has one reader", "cli/train.py", "import os as system\nsystem.getenv('RANK')"),
    ("process groups have one maker", "runtime/links.py", "import torch.distributed as dist\ndist.new_group([0])"),
    ("process groups have one maker", "runtime/links.py", "backend().new_group([0])"),
    ("torch's private names have one door", "runtime/stage.py", "from torch._C import DisableTorchFunction"),
    ("torch's private names have one door", "runtime/stage.py", "import torch.utils._pytree as pytree"),
    ("torch's private names have one door", "runtime/stage.py", "import torch\ntorch._dynamo.reset()"),
    ("torch's private names have one door", "runtime/stage.py", "from torch import nn\nnn.Module._call_impl"),
    ("files are small", "runtime/engine.py", "x = 1\n" * (LINES + 1)),
    ("files are not named as standard modules", "partitioner/profile.py", ""),
    ("nothing is global", "runtime/groups.py", "def f():\n    global group\n    group = 1"),
    ("what is public is documented", "api.py", "x = 1"),
    ("what is public is documented", "api.py", '"""Door."""\ndef auto_parallel(): ...'),
    ("what is public is documented", "api.py", '"""Door."""\nclass Engine: ...'),
    ("no machine paths", "cli/train.py", f"CACHE = '{'/'.join(['', 'home', 'ann', 'cache'])}'"),
]


@pytest.mark.parametrize(("rule", "path", "source"), GUILTY)
def test_rule_finds_what_breaks_it(rule: str, path: str, source: str):
    assert RULES[rule](path, source)


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _, _ in GUILTY} == set(RULES)


INNOCENT = [
    ("imports are absolute", "api.py", "from merak_like.partitioner import plan"),
    (
        "the top-level links are not imported",
        "api.py",
        "from merak_like.runtime import engine\nruntime = engine.runtime",
    ),
    ("the package imports from modules, not from its own front", "cli/show.py", "from merak_like import __version__"),
    ("partitioner knows nothing above it", "partitioner/planner.py", "from merak_like.partitioner import cost"),
    ("runtime knows nothing above it", "runtime/engine.py", "from merak_like.partitioner.plan import Plan"),
    ("schedules, plan, mesh, graph and report do without torch", "partitioner/cost.py", "import torch"),
    ("transformers has one door", "hf/__init__.py", "import transformers"),
    ("torch.fx has its doors", "partitioner/tracer/record.py", "from torch.fx import Graph"),
    ("the environment has one reader", "runtime/initialize.py", "import os\nos.environ['RANK']"),
    ("the environment has one reader", "cli/train.py", "import os\nos.path.join('a', 'b')"),
    ("process groups have one maker", "runtime/groups.py", "import torch.distributed as dist\ndist.new_group([0])"),
    ("torch's private names have one door", "_compat.py", "import torch._C"),
    ("torch's private names have one door", "api.py", "import torch\ntorch.__version__\nself._x.torch"),
    ("files are small", "runtime/engine.py", "x = 1\n" * LINES),
    ("what is public is documented", "api.py", '"""Door."""\ndef _helper(): ...'),
    ("no machine paths", "api.py", "see https://example.org/home/page and docs/data/table.csv"),
]


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_rule_leaves_the_innocent_alone(rule: str, path: str, source: str):
    assert not RULES[rule](path, source)


def test_files_allowed_to_be_longer_are_and_exist():
    assert all(LINES < len(SOURCES[path].splitlines()) <= MOST_LINES for path in LONGER)


def outside() -> Iterator[tuple[str, str]]:
    """Tests, examples and benchmarks: their sizes and what they import matter too."""
    for folder in ("tests", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_nobody_imports_the_top_level_links():
    rule = RULES["the top-level links are not imported"]
    assert not [complaint for path, source in outside() for complaint in rule(path, source)]


def test_files_outside_the_package_are_small_too():
    sizes = {path: len(source.splitlines()) for path, source in outside()}
    assert not {path: lines for path, lines in sizes.items() if lines > MOST_LINES}


@pytest.mark.parametrize("half", ["partitioner", "runtime"])
def test_top_level_links_lead_into_the_package(half: str):
    assert (ROOT / half).is_symlink()
    assert (ROOT / half).resolve() == PACKAGE / half


def test_schedules_plan_mesh_graph_and_report_do_not_load_torch():
    """Not by way of another module either: reading a plan must not cost torch's seconds of start-up."""
    pure = [path for path in SOURCES if any(fnmatch(path, where) for where in NO_TORCH)]
    modules = [f"merak_like.{path.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}" for path in pure]
    probe = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", probe], cwd=ROOT, capture_output=True, text=True)
    tail = "\n".join(line for line in run.stderr.splitlines() if "merak_like" in line or line.endswith(" torch"))
    assert run.returncode == 0, (
        f"the importer of torch is the next line, one step further left:\n{tail}\n{run.stderr[-500:]}"
    )


@pytest.mark.parametrize("name", sorted(merak_like.PUBLIC))
def test_public_names_are_there(name: str):
    assert getattr(merak_like, name) is getattr(import_module(merak_like.PUBLIC[name]), name)


def test_type_checkers_see_the_same_public_names():
    names = {name for name, _ in dotted_names(SOURCES["__init__.py"]) if name.startswith("merak_like.")}
    assert {f"{module}.{name}" for name, module in merak_like.PUBLIC.items()} <= names
    assert set(merak_like.PUBLIC) <= set(dir(merak_like))
