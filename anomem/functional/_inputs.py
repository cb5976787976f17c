"""How inputs meet a kernel: the checks that the memory operators share, autocast and strides."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from anomem.ops.library import Memory, accumulator, in_forward_mode
from anomem.reference.retrieve import NORMALIZE, Normalize
from anomem.validation import require, require_choice, require_number, require_same_kind, require_tensor


def kind_of_call(name: str, tensors: tuple[Tensor, ...], *arguments: object) -> Hashable | None:
    """What calls have in common that pass the same checks and get the same choice; None where something unusual is on.

    Of a small call, checks and choice take longer than its arithmetic. `anomem.backends` remembers the choice by this.

    Args:
        name: of the operator.
        tensors: that it is called with.
        arguments: all others that are checked, or that the choice depends on; only of plain ones there is a kind.
    """
    c = torch._C
    if torch.compiler.is_compiling() or c._are_functorch_transforms_active() or c._len_torch_dispatch_stack():
        return None
    if in_forward_mode() or c._is_tracing():
        return None
    if not (all(type(x) in _PLAIN for x in tensors) and all(type(x) in _PLAIN_ARGUMENTS for x in arguments)):
        return None
    if _autocast_is_on(tensors[0].device.type):
        return None
    about = [(x.shape, x.dtype, x.device, x.layout) for x in tensors]
    return name, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), *arguments, *about


_PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_ARGUMENTS = (str, float, bool, type(None))


def memory_inputs(
    query: Tensor,
    argument: str,
    features: int,
    prototypes: Tensor,
    values: Tensor | None,
    beta: float | Tensor | None,
    normalize: Normalize,
) -> tuple[Tensor, Memory]:
    """Check the arguments of a retrieval and cast them under autocast.

    Args:
        query: a floating tensor, checked already.
        argument: its name.
        features: d, the length of its rows.
        prototypes: expected to be [M, d].
        values: expected to be [M, dv], or None.
        beta: expected to be a number or a 0-dim tensor; 1/sqrt(d) when None.
        normalize: expected to be a name of `Normalize`.

    Returns:
        The query and its memory, of one device and dtype; a learned beta is left as it is.

    Raises:
        ArgumentError: an argument is not as expected.
    """
    require_tensor(prototypes, "prototypes", (2,), "[M, d]")
    require(features > 0, argument, "rows of length d ≥ 1", query)
    right = prototypes.shape[1] == features
    require(right, "prototypes", lambda: f"[M, {features}], rows as of `{argument}`", prototypes)
    count = prototypes.shape[0]
    require(count > 0, "prototypes", "at least one row", prototypes)
    require_choice(normalize, "normalize", NORMALIZE)
    if beta is None:
        beta = float(features) ** -0.5  # a number of a symbolic size too
    require_number(beta, "beta")
    if values is not None:
        require_tensor(values, "values", (2,), "[M, dv]")
        require(values.shape[0] == count, "values", lambda: f"[{count}, dv], one row per prototype", values)
    query, prototypes, values = autocast_inputs(query, prototypes, values)
    require_same_kind(prototypes, "prototypes", query, argument)
    if values is not None:
        require_same_kind(values, "values", query, argument)
    learned, scale = (beta, 1.0) if isinstance(beta, Tensor) else (None, beta)
    return query, Memory(prototypes, values, learned, scale, normalize)


def require_width(values: Tensor, features: int) -> None:
    """Values that are compared with queries: [M, d] of the same d."""
    require_tensor(values, "values", (2,), "[M, d]")
    require(values.shape[1] == features, "values", lambda: f"[M, {features}]", values)


def bank_inputs(x: Tensor, argument: str, prototypes: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Check rows against a memory or several banks of one, and cast them under autocast.

    Args:
        x: expected to be [..., d]; for banks [L, N, d], or [N, d].
        argument: its name.
        prototypes: expected to be [M, d] or [L, M, d].

    Returns:
        Rows [L, N, d] or [1, N, d], banks [L, M, d], and the leading axes of a result with one number per row.

    Raises:
        ArgumentError: an argument is not as expected.
    """
    require_tensor(x, argument, (), "[..., d]")
    require_tensor(prototypes, "prototypes", (2, 3), "[M, d] or [L, M, d]")
    features = x.shape[-1]
    require(features > 0, argument, "rows of length d ≥ 1", x)
    right = prototypes.shape[-1] == features
    require(right, "prototypes", lambda: f"rows of length {features}, as of `{argument}`", prototypes)
    some = prototypes.shape[-2] > 0 and prototypes.shape[0] > 0
    require(some, "prototypes", "at least one row", prototypes)
    x, prototypes = autocast_inputs(x, prototypes)
    require_same_kind(prototypes, "prototypes", x, argument)
    if prototypes.dim() == 2:
        return x.reshape(1, -1, features), prototypes[None], tuple(x.shape[:-1])
    banks = prototypes.shape[0]
    fits = x.dim() == 2 or (x.dim() == 3 and x.shape[0] == banks)
    require(fits, argument, lambda: f"[{banks}, N, {features}] or [N, {features}]", x)
    return (x if x.dim() == 3 else x[None]), prototypes, (banks, x.shape[-2])


def reference_memory(memory: Memory, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the reference functions, tensors in the accumulation dtype."""
    return {
        "prototypes": memory.keys.to(dtype),
        "values": None if memory.values is None else memory.values.to(dtype),
        "beta": memory.inverse_temperature,
        "normalize": memory.normalize,
    }


def kernel_memory(memory: Memory) -> Memory:
    """The memory as the operators take it: contiguous, beta on its device in the accumulation dtype."""
    keys, values, beta, scale, normalize = memory
    if beta is None:
        beta, scale = scalar(scale, keys)
    else:
        beta = beta.to(device=keys.device, dtype=accumulator(keys))
    return Memory(keys.contiguous(), None if values is None else values.contiguous(), beta, scale, normalize)


def autocast_inputs(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on; float64 is left alone, as torch's own matrix products do."""
    device, tensors = first.device.type, (first, *others)
    if not _autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """The reference chooses its own precision: no cast of its inner products."""
    if _autocast_is_on(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _autocast_is_on(device: str) -> bool:
    # On "meta" tensors shapes are tried out; it has no autocast, and asking it is an error.
    return device != "meta" and torch.is_autocast_enabled(device)


def is_channels_last(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] is B·H·W adjacent rows of C channels."""
    # `is_contiguous` cannot be asked this under torch.func.vmap. The stride of a single image says nothing.
    if x.dim() != 4:
        return False
    batch, channels, height, width = x.shape
    image = x.stride()[1:] == (1, width * channels, channels)
    return image and (batch <= 1 or x.stride(0) == height * width * channels)


def scalar(value: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """Split a number-or-tensor into what kernels take: (tensor in the accumulation dtype or None, number).

    With a tensor the number is 1: kernels that scale multiply by both, the others read the tensor only. A number that
    varies under torch.compile (a schedule) becomes a tensor.
    """
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=accumulator(like)), 1.0
    if _varies(value):
        return like.new_ones((), dtype=accumulator(like)) * value, 1.0
    return None, float(value)


def numbers(*values: float | Tensor) -> list[Any]:
    """The numbers; if one is a tensor or varies under torch.compile, all as 0-dim CPU tensors, as `scheduled` overloads
    take them.
    """
    if any(isinstance(value, Tensor) or _varies(value) for value in values):
        return [torch.ones((), dtype=torch.float64) * value for value in values]
    return [float(value) for value in values]


def _varies(value: float) -> bool:
    # An operator's float argument specialises the graph: every new number would compile it again.
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not has_static_value(value)
