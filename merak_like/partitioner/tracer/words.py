"""What the recorder knows about torch functions by name; whatever is not here must show its effect in tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

READERS = frozenset("item tolist __bool__ __int__ __float__ __complex__ __index__ is_nonzero equal allclose".split())
"""Methods that turn a tensor's data into Python values."""

QUERIES = frozenset(
    "size dim numel nelement stride storage_offset element_size is_contiguous is_floating_point is_complex is_signed "
    "is_set_to is_same_size is_inference is_conj is_neg get_device ndimension type __len__ __hash__ __repr__ __str__ "
    "__format__ __dir__ untyped_storage _is_view has_names is_pinned is_shared result_type can_cast promote_types "
    "is_tensor is_storage broadcast_shapes _has_compatible_shallow_copy_type is_vulkan_available dense_dim sparse_dim "
    "is_distributed data_ptr __contains__ _typed_storage __reduce_ex__ __deepcopy__ _nnz "
    "_use_cudnn_ctc_loss _use_cudnn_rnn_flatten_weight _fused_sdp_choice compute_contiguous_strides_for is_vulkan "
    "__torch_function__ is_autocast_enabled".split()
)
"""Functions of tensors that answer without data and change nothing."""

EFFECTS = frozenset("register_hook register_post_accumulate_grad_hook __set__ retain_grad requires_grad_".split())
"""Functions that change a tensor's state without touching its data."""

FORBIDDEN = frozenset("backward manual_seed seed set_rng_state set_default_dtype set_ numpy __array__".split())
"""Functions that reach outside the graph in a way that cannot be replayed per stage."""

RANDOM = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ exponential_ dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "rrelu gumbel_softmax poisson cauchy_ log_normal_ geometric_ fractional_max_pool2d".split()
)
"""Functions that draw random numbers: kept even when nothing reads them, so that the stream of numbers is the same."""

CHANCES: Mapping[str, tuple[str, int]] = {
    "scaled_dot_product_attention": ("dropout_p", 4), "multi_head_attention_forward": ("dropout_p", 10),
    "lstm": ("dropout", 5), "gru": ("dropout", 5), "rnn_tanh": ("dropout", 5), "rnn_relu": ("dropout", 5),
    "dropout": ("p", 1), "dropout1d": ("p", 1), "dropout2d": ("p", 1), "dropout3d": ("p", 1),
    "alpha_dropout": ("p", 1), "feature_alpha_dropout": ("p", 1), "native_dropout": ("p", 1),
}  # fmt: skip
"""Functions that draw only with a probability above 0: the argument's name and place."""


def draws(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call draws random numbers (when in doubt, yes)."""
    if name in CHANCES:
        key, place = CHANCES[name]
        chance = kwargs.get(key, args[place] if len(args) > place else 0.5 if key == "p" else 0.0)
        training = kwargs.get("training", args[2] if name.endswith("dropout") and len(args) > 2 else True)
        return bool(chance) and bool(training)
    return name in RANDOM


_IN_PLACE_OPERATORS = frozenset(
    "__setitem__ __set__ __delitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ "
    "__iand__ __ior__ __ixor__ __ilshift__ __irshift__ __imatmul__".split()
)


def in_place(name: str) -> bool:
    """Whether a torch function of this name changes its first argument: ``add_``, ``__setitem__``."""
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
