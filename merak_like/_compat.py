"""The one door to names torch and its friends do not promise to keep. Each has a test in tests/test_compat.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.utils._pytree as _pytree
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch import apis as _functorch_apis
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "DATA_DEPENDENT",
    "BackwardCFunction",
    "CheckpointFunction",
    "FakeTensor",
    "FakeTensorMode",
    "StorageWeakRef",
    "TorchDispatchMode",
    "around_vmap",
    "as_in_a_real_run",
    "call_module",
    "compiled_call",
    "compiled_function_stance",
    "converting_modules",
    "fake_like",
    "fake_parameter",
    "fake_store",
    "fake_tensor",
    "fake_view",
    "has_step_hooks",
    "is_compiled",
    "is_functorch_tensor",
    "no_torch_function",
    "storage_key",
    "tensor_methods",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "unset_fake",
]

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What a fake tensor raises when a result depends on values it does not have."""

tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
unset_fake = unset_fake_temporarily
no_torch_function = torch._C.DisableTorchFunction


def tree_flatten_with_path(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Every leaf of a nested container with its path: ints and strings to index by, ``.name`` for attributes."""
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return [(tuple(_step(key) for key in path), leaf) for path, leaf in leaves]


def _step(key: Any) -> Any:
    if isinstance(key, _pytree.SequenceKey):
        return key.idx
    if isinstance(key, _pytree.MappingKey):
        return key.key
    if isinstance(key, _pytree.GetAttrKey):
        return f".{key.name}"
    raise TypeError(f"no way to follow {key!r} into a container")


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor: equal for views and ties, also on meta and fake tensors."""
    return tensor.untyped_storage()._cdata


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake tensor with the shape, strides and dtype of ``tensor`` that claims to live on ``device``."""
    return fake_tensor(mode, tuple(tensor.shape), tensor.stride(), tensor.dtype, device)


def fake_tensor(
    mode: FakeTensorMode, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A fake tensor that claims to live on ``device``."""
    with unset_fake_temporarily():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


def fake_view(
    mode: FakeTensorMode, base: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """A fake tensor on the memory of ``base``, as a view function would give (a quarter of a dispatched view's time).

    In-place work on either is seen in the ``_version`` of both.
    """
    with in_kernel_invocation_manager(mode), torch.no_grad():
        meta = torch.as_strided(base, shape, stride, offset)
    return FakeTensor(mode, meta, device)


def tensor_methods() -> dict[Any, str]:
    """The methods of tensors by the function that ``__torch_function__`` is given for them."""
    found: dict[Any, str] = {}
    for name in dir(torch.Tensor):
        method = getattr(torch.Tensor, name)
        if type(method).__name__ in ("method_descriptor", "wrapper_descriptor", "function"):
            mine = getattr(torch.Tensor, getattr(method, "__name__", name), None)
            found[method] = method.__name__ if mine == method else name
    return found


def fake_parameter(mode: FakeTensorMode, parameter: torch.nn.Parameter, device: torch.device) -> torch.Tensor:
    """A fake tensor that ``isinstance`` takes for a Parameter (``nn.Parameter(fake)`` costs a dispatched detach)."""
    fake = fake_like(mode, parameter, device).requires_grad_(parameter.requires_grad)
    fake._is_param = True  # type: ignore[attr-defined]
    return fake


def fake_store() -> Any:
    """A store that says yes to everything: for a process that plays one rank of a job of many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # here: it is of no use to training

    return FakeStore()


def is_functorch_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to a vmap or grad transform in progress."""
    return is_functorch_wrapped_tensor(tensor)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the module, by wrapping it or in place."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def compiled_call(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager call of a module that may have been compiled."""
    inner = getattr(module, "_orig_mod", None)
    return module._call_impl if inner is None else inner.__call__


def call_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module with its hooks, never its compiled form."""
    return compiled_call(module)(*args, **kwargs)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something was registered to run before or after each step of the optimizer."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@contextmanager
def converting_modules(convert: Callable[..., torch.nn.Module]) -> Iterator[None]:
    """Send what ``Module.to`` and its like do to each tensor through ``convert(module, fn, recurse=True)``."""
    original = torch.nn.Module._apply
    torch.nn.Module._apply = convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def around_vmap(outermost: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter ``outermost()`` around every call of ``torch.vmap`` that is not inside another."""
    apis: Any = _functorch_apis
    original, depth = apis.vmap_impl, [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            with outermost() if depth[0] == 1 else nullcontext():
                return original(*args, **kwargs)
        finally:
            depth[0] -= 1

    apis.vmap_impl = wrapped
    try:
        yield
    finally:
        apis.vmap_impl = original


def compiled_function_stance() -> AbstractContextManager[Any]:
    """Run functions wrapped by ``torch.compile`` eagerly; costs nothing where nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def as_in_a_real_run() -> Iterator[Callable[[], bool]]:
    """Libraries that look for fake tensors see none, so that they choose kernels and masks as in a real run.

    transformers builds a full attention mask for fake tensors, which keeps the flash kernels out, and skips checks of
    the batch. Yields whether anybody asked.
    """
    module = sys.modules.get("transformers.utils.import_utils")
    asked = False

    def no(_: object) -> bool:
        nonlocal asked
        asked = True
        return False

    before = getattr(module, "is_fake_tensor", None)
    if before is not None:
        setattr(module, "is_fake_tensor", no)  # noqa: B010
    try:
        yield lambda: asked
    finally:
        if before is not None:
            setattr(module, "is_fake_tensor", before)  # noqa: B010


def record_memory(what: Literal["state", "all"] | None) -> None:
    """Remember what is allocated on GPUs and by which line: what there is ("state"), what there was too ("all"), or no
    more (None)."""
    torch.cuda.memory._record_memory_history(what)


def dump_memory(path: Any) -> None:
    """Write what was remembered, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))
