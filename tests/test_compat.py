"""Each name behind the one door to torch's private names still does what the tracer relies on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from merak_like import _compat

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def mode() -> Any:
    return _compat.FakeTensorMode(allow_non_fake_inputs=True)


def fake(mode: Any, *shape: int, device: torch.device = CPU) -> Tensor:
    return _compat.fake_like(mode, torch.zeros(shape), device)


def test_every_name_has_its_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {name.lower() for name in _compat.__all__} <= {name.lower() for name in tests}


# -------------------------------------------------------------------------------------------------------- fake tensors
def test_FakeTensor(mode: Any) -> None:
    tensor = fake(mode, 2, 3, device=CUDA)
    assert isinstance(tensor, _compat.FakeTensor)
    assert tensor.constant is None
    assert tensor.fake_device == CUDA
    assert isinstance(tensor, Tensor)


def test_FakeTensorMode(mode: Any) -> None:
    with mode:
        made = torch.ones(2, 3) @ fake(mode, 3, 4)
    assert isinstance(made, _compat.FakeTensor)
    assert made.shape == (2, 4)


def test_DATA_DEPENDENT(mode: Any) -> None:
    tensor = fake(mode, 3)
    with mode:
        for question in (tensor.nonzero, tensor.sum().item):
            with pytest.raises(_compat.DATA_DEPENDENT):
                question()


def test_unset_fake(mode: Any) -> None:
    with mode, _compat.unset_fake():
        assert not isinstance(torch.ones(2), _compat.FakeTensor)


def test_fake_like(mode: Any) -> None:
    example = torch.zeros(4, 3, dtype=torch.bfloat16).T
    tensor = _compat.fake_like(mode, example, CUDA)
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == ((3, 4), (1, 3), torch.bfloat16, CUDA)


def test_fake_tensor(mode: Any) -> None:
    tensor = _compat.fake_tensor(mode, (2, 3), (3, 1), torch.int64, CPU)
    assert isinstance(tensor, _compat.FakeTensor)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 3), torch.int64, CPU)


def test_fake_view(mode: Any) -> None:
    """As a real view: the same memory, and both know of in-place work on either."""
    base = fake(mode, 4, 6, device=CUDA)
    with mode:
        view = _compat.fake_view(mode, base, (2, 3), (6, 1), 6, CUDA)
        assert (view.shape, view.stride(), view.storage_offset(), view.device) == ((2, 3), (6, 1), 6, CUDA)
        assert _compat.storage_key(view) == _compat.storage_key(base)
        view.mul_(2)
        assert (base._version, view._version) == (1, 1)
        base.add_(1)
        assert (base._version, view._version) == (2, 2)


def test_fake_parameter(mode: Any) -> None:
    frozen = _compat.fake_parameter(mode, nn.Parameter(torch.ones(2), requires_grad=False), CPU)
    assert isinstance(frozen, nn.Parameter)
    assert not frozen.requires_grad
    assert _compat.fake_parameter(mode, nn.Parameter(torch.ones(2)), CPU).requires_grad


def test_fake_store() -> None:
    torch.distributed.init_process_group("fake", store=_compat.fake_store(), rank=3, world_size=1024)
    try:
        assert torch.distributed.get_world_size(torch.distributed.new_group([1, 3, 700])) == 3  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()


def test_storage_key(mode: Any) -> None:
    for one, two in (
        (torch.ones(4), torch.ones(4)),
        (fake(mode, 4), fake(mode, 4)),
        (torch.ones(4, device="meta"),) * 2,
    ):
        assert _compat.storage_key(one) == _compat.storage_key(one[1:])
        assert (_compat.storage_key(one) == _compat.storage_key(two)) == (one is two)


def test_StorageWeakRef() -> None:
    """Equal for views, as a key of a dictionary too, and expired once the last of them is gone."""
    one = torch.zeros(4)
    held = _compat.StorageWeakRef(one.untyped_storage())
    view = one[1:]
    assert {held: 1}[_compat.StorageWeakRef(view.untyped_storage())] == 1
    assert held != _compat.StorageWeakRef(torch.zeros(4).untyped_storage())
    del one
    assert not held.expired()
    del view
    assert held.expired()


# ------------------------------------------------------------------------------------------------------------ autograd
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def test_BackwardCFunction() -> None:
    x = torch.ones(2, requires_grad=True)
    assert isinstance(Twice.apply(x).grad_fn, _compat.BackwardCFunction)
    assert type(Twice.apply(x).grad_fn).__name__ == "TwiceBackward"
    assert not isinstance((x * 2).grad_fn, _compat.BackwardCFunction)


def test_CheckpointFunction(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a re-entrant checkpoint applies, and where in its arguments the function and the inputs are."""
    seen: list[Any] = []
    monkeypatch.setattr(_compat.CheckpointFunction, "apply", lambda *args: seen.append(args))
    function, x = torch.tanh, torch.ones(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=True)
    ((found, _, *inputs),) = seen
    assert found is function
    assert inputs == [x]


# ------------------------------------------------------------------------------------------------------------- modules
class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return super().forward(x)


def uncallable(*_: Any) -> Any:
    raise AssertionError("the compiled form was called")


def test_is_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not _compat.is_compiled(module)
    assert _compat.is_compiled(torch.compile(module))  # type: ignore[arg-type]
    module.compile()
    assert _compat.is_compiled(module)


def test_call_module() -> None:
    calls: list[int] = []
    wrapped: Any = torch.compile(Counted(2, 2), backend=uncallable)
    for compiled in (wrapped, Counted(2, 2)):
        compiled.register_forward_hook(lambda *_: calls.append(1))
        if isinstance(compiled, Counted):
            compiled.compile(backend=uncallable)
        assert _compat.call_module(compiled, torch.ones(1, 2)).shape == (1, 2)
    assert calls == [1]


def test_compiled_call() -> None:
    module = Counted(2, 2)
    assert _compat.compiled_call(module) == module._call_impl
    module.compile(backend=uncallable)
    _compat.compiled_call(module)(torch.ones(1, 2))
    assert module.calls == 1


def test_compiled_function_stance() -> None:
    function = torch.compile(torch.sin, backend=uncallable)
    with _compat.compiled_function_stance():
        assert torch.equal(function(torch.zeros(2)), torch.zeros(2))


def test_converting_modules() -> None:
    seen: list[Any] = []

    def convert(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        seen.append(fn(torch.ones(1)).dtype)
        return module

    original = nn.Module._apply
    model = nn.Linear(2, 2)
    with _compat.converting_modules(convert):
        assert model.to(torch.float64) is model
        assert model.half() is model
    assert nn.Module._apply is original
    assert seen == [torch.float64, torch.float16]
    assert model.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------- what torch runs through
class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_tensor_methods() -> None:
    methods = _compat.tensor_methods()
    x = torch.ones(2, 2)
    with Names() as names:
        _ = (x.view(-1), x + x, x[0], x**2, -x, x.mT)
    found = [methods.get(function) for function in names.functions]
    assert found[:4] == ["view", "add", "__getitem__", "__pow__"]
    assert found[4] in ("neg", "__neg__")
    assert found[5] is None  # a property
    assert methods.get(torch.relu) is None
    assert all(getattr(torch.Tensor, name) == function for function, name in methods.items())


def test_no_torch_function() -> None:
    with Names() as names:
        with _compat.no_torch_function():
            torch.ones(2).sum()
        assert names.functions == []
        torch.ones(2)
        assert len(names.functions) == 1


def test_is_functorch_tensor() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(_compat.is_functorch_tensor(x))
        return x

    torch.vmap(look)(torch.ones(2, 3))
    look(torch.ones(2))
    assert seen == [True, False]


def test_around_vmap() -> None:
    entered: list[int] = []

    @contextmanager
    def outermost() -> Iterator[None]:
        entered.append(1)
        yield

    with _compat.around_vmap(outermost):
        nested = torch.vmap(torch.vmap(torch.sin))
        nested(torch.ones(2, 3))
        assert entered == [1]
        nested(torch.ones(2, 3))
        assert entered == [1, 1]
    nested(torch.ones(2, 3))
    assert entered == [1, 1]


def test_TorchDispatchMode() -> None:
    """Below vmap it sees kernels on ordinary tensors with the batch dimension in them."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Kernels(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not func._schema.is_mutable
            if args and isinstance(args[0], Tensor):
                assert not _compat.is_functorch_tensor(args[0])
                seen.append((func.overloadpacket.__name__, tuple(args[0].shape)))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3)
    with Kernels():
        torch.vmap(torch.sin)(x)
    assert ("sin", (2, 3)) in seen


def test_as_in_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("transformers.utils.import_utils")
    library.is_fake_tensor = lambda x: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    with _compat.as_in_a_real_run() as asked:
        assert not asked()
        assert library.is_fake_tensor(None) is False
        assert asked()
    assert library.is_fake_tensor(None) is True


def test_the_library_still_asks_where_it_is_answered() -> None:
    from transformers.utils import import_utils

    assert callable(import_utils.is_fake_tensor)


# --------------------------------------------------------------------------------------------------------------- trees
class Pair(NamedTuple):
    left: Any
    right: Any


TREE = {"a": [1, (2, None)], "b": Pair(3, {"c": 4})}


def test_tree_flatten_with_path() -> None:
    found = dict(_compat.tree_flatten_with_path(TREE))
    assert found == {("a", 0): 1, ("a", 1, 0): 2, ("b", ".left"): 3, ("b", ".right", "c"): 4, ("a", 1, 1): None}


def test_tree_leaves() -> None:
    assert _compat.tree_leaves(TREE) == [1, 2, None, 3, 4]


def test_tree_map() -> None:
    assert _compat.tree_map(lambda x: x and x * 2, TREE) == {"a": [2, (4, None)], "b": Pair(6, {"c": 8})}


def test_has_step_hooks() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert not _compat.has_step_hooks(optimizer)
    hook = optimizer.register_step_post_hook(lambda *_: None)
    assert _compat.has_step_hooks(optimizer)
    hook.remove()
    optimizer.register_step_pre_hook(lambda *_: None)
    assert _compat.has_step_hooks(optimizer)
