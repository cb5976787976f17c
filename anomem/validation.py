"""One shape, dtype and device contract for every operator, whichever backend runs it.

Nothing here reads the contents of a tensor on an accelerator: a check must not wait for the device. Index tensors are
checked by value where that is free (CPU tensors outside of tracing); on an accelerator the kernels guard themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anomem.errors import ArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(
    condition: bool,
    argument: str,
    expected: str | Callable[[], str],
    received: object,
    hint: str | None = None,
) -> None:
    """Raise `ArgumentError` unless the condition holds.

    Args:
        condition: what must be true.
        argument: name of the argument as the caller spells it.
        expected: what would have been right; a function where the text must be put together, so that a good call
            formats nothing (and `torch.compile` has nothing to format).
        received: what came; a tensor is shown as its shape, an array as its type, a function is called.
        hint: what to do about it.
    """
    if condition:
        return
    if isinstance(received, Tensor):
        received = f"shape {shape_of(received)}"
    elif getattr(received, "ndim", 0) > 0:  # an array, whose text has many lines
        received = type(received).__name__
    elif callable(received):
        received = received()
    raise ArgumentError(argument, expected if isinstance(expected, str) else expected(), received, hint)


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape as the docstrings write it: "[4, 16]"."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def require_tensor(tensor: object, argument: str, dims: Sequence[int], layout: str) -> None:
    """A floating tensor with one of the given numbers of axes.

    Args:
        tensor: what the caller passed.
        argument: its name.
        dims: allowed numbers of axes; an empty sequence allows one and more.
        layout: the shape in words, for the message: "[M, d]".
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentError(argument, f"a tensor {layout}", type(tensor).__name__)
    right = tensor.dim() in dims if dims else tensor.dim() >= 1
    require(right, argument, lambda: f"a tensor {layout}", tensor)
    require(tensor.dtype in FLOATS, argument, "float32, bfloat16, float16 or float64", tensor.dtype)
    require(tensor.layout == torch.strided, argument, "a dense tensor", tensor.layout)


def require_images(images: object, argument: str) -> None:
    """A batch of images: a tensor [B, C, H, W] of uint8, or of floating values in [0, 1], which are not read."""
    if not isinstance(images, Tensor):
        raise ArgumentError(argument, "a tensor [B, C, H, W]", type(images).__name__)
    require(images.dim() == 4, argument, "a tensor [B, C, H, W]", images)
    right = images.dtype == torch.uint8 or images.is_floating_point()
    require(right, argument, "uint8, or float in [0, 1]", images.dtype)


def require_views(z: Tensor, argument: str, z_pair: Tensor, pair_argument: str) -> None:
    """Two views of one batch, or of many groups of batches: floating tensors of one shape."""
    require_tensor(z, argument, (2, 3), "[B, d] or [G, B, d]")
    require_tensor(z_pair, pair_argument, (2, 3), "[B, d] or [G, B, d]")
    require(z.shape == z_pair.shape, pair_argument, lambda: f"the shape of `{argument}`, {shape_of(z)}", z_pair)


def require_same_device(tensor: Tensor, argument: str, other: Tensor, other_argument: str) -> None:
    """Two tensors on one device: a kernel reads the memory behind a tensor wherever it lies."""
    same = tensor.device == other.device
    require(same, argument, lambda: f"the device of `{other_argument}` ({other.device})", tensor.device)


def require_same_kind(tensor: Tensor, argument: str, other: Tensor, other_argument: str) -> None:
    """Two tensors on one device and of one dtype."""
    require_same_device(tensor, argument, other, other_argument)
    require(
        tensor.dtype == other.dtype,
        argument,
        lambda: f"the dtype of `{other_argument}` ({other.dtype})",
        tensor.dtype,
        "convert one of them, or call under torch.autocast",
    )


def require_choice(value: object, argument: str, choices: Sequence[str]) -> None:
    """One of a few names."""
    require(value in choices, argument, lambda: "one of " + ", ".join(repr(c) for c in choices), lambda: _shown(value))


def require_positive_number(value: float | Tensor, argument: str) -> None:
    """A finite number > 0, or a 0-dim floating tensor (a learned one: its value is not read)."""
    require_number(value, argument)
    if not isinstance(value, Tensor):
        require(value > 0, argument, "a number > 0", value)


def require_number(value: float | Tensor, argument: str) -> None:
    """A finite number, or a 0-dim floating tensor (whose value is not read)."""
    if isinstance(value, Tensor):
        require(value.dim() == 0, argument, "a number or a 0-dim tensor", value)
        require(value.is_floating_point(), argument, "a floating tensor", value.dtype)
        return
    # Comparisons rather than math.isfinite: under torch.compile the number may be symbolic.
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    require(right, argument, "a finite number or a 0-dim tensor", lambda: _shown(value))


def _shown(value: object) -> str:
    """As Python writes it; of a tensor, whose text has many lines, the shape."""
    return f"a tensor of shape {shape_of(value)}" if isinstance(value, Tensor) else repr(value)


def require_setting(value: object, argument: str) -> None:
    """A finite number of Python, as a configuration holds: neither a text nor a tensor."""
    require(_is_setting(value), argument, "a finite number", lambda: _shown(value))


def require_pair(value: object, argument: str, expected: str) -> None:
    """Two finite numbers of Python."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_setting, value))
    require(pair, argument, expected, lambda: _shown(value))


def _is_setting(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def require_names(names: Sequence[str], argument: str, choices: Sequence[str]) -> None:
    """Several of a few names."""
    require_several(names, argument)
    for name in names:
        require_choice(name, argument, choices)


def require_several(values: object, argument: str) -> None:
    """A sequence and no text, which is one of letters."""
    right = isinstance(values, Sequence) and not isinstance(values, str)
    require(right, argument, "a sequence", lambda: repr(values))


def require_size(size: object, argument: str) -> None:
    """Height and width in pixels: two integers ≥ 1."""
    right = isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side >= 1 for side in size)
    require(right, argument, "(height, width) in pixels", lambda: repr(size))


def require_schedule(value: float | Tensor, argument: str) -> None:
    """A finite number, or a 0-dim floating tensor on the CPU without gradient: a number that is set while training."""
    require_number(value, argument)
    if isinstance(value, Tensor):
        require(value.device.type in ("cpu", "meta"), argument, "a number or a tensor on the CPU", value.device)
        require(not value.requires_grad, argument, "a number or a tensor without gradient", "one that requires grad")


def require_count(value: object, argument: str, at_least: int, at_most: int | None = None) -> None:
    """An integer with a lower and, where given, an upper bound."""
    right = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    require(right, argument, lambda: f"an integer ≥ {at_least}", lambda: _shown(value))
    fits = at_most is None or (isinstance(value, int) and value <= at_most)
    require(fits, argument, lambda: f"an integer from {at_least} to {at_most}", lambda: _shown(value))


def require_mask(mask: object, argument: str, count: int) -> None:
    """A bool tensor with one value of each of so many images or rows."""
    if not isinstance(mask, Tensor):
        raise ArgumentError(argument, f"a bool tensor [{count}]", type(mask).__name__)
    right = mask.dtype == torch.bool and mask.shape == (count,)
    require(right, argument, lambda: f"bool [{count}]", lambda: f"{mask.dtype} {shape_of(mask)}")


def require_index(index: object, argument: str, layout: str, dims: Sequence[int], size: int, axis: str) -> None:
    """An int64 tensor whose values lie in [0, size).

    Args:
        index: what the caller passed.
        argument: its name.
        layout: its shape in words.
        dims: allowed numbers of axes.
        size: length of the indexed axis.
        axis: that axis in words, for the message.
    """
    if not isinstance(index, Tensor):
        raise ArgumentError(argument, f"an int64 tensor {layout}", type(index).__name__)
    require(index.dim() in dims, argument, lambda: f"an int64 tensor {layout}", index)
    require(index.dtype == torch.int64, argument, "int64", index.dtype)
    if index.numel() and values_are_free(index):
        low, high = (int(v) for v in torch.aminmax(index))
        require(
            low >= 0 and high < size,
            argument,
            lambda: f"indices from 0 to {size - 1} ({axis})",
            lambda: f"{low} to {high}",
        )


def require_pixels(images: Tensor, argument: str) -> None:
    """Require uint8 pixels, or floating ones in [0, 1]."""
    if images.dtype == torch.uint8:
        return
    require(images.is_floating_point(), argument, "uint8, or float in [0, 1]", images.dtype)
    if images.numel() and values_are_free(images):
        low, high = (float(v) for v in images.aminmax())
        right = low >= 0 and high <= 1  # NaN is neither
        hint = "divide by 255, or give uint8"
        require(right, argument, "floating pixels from 0 to 1", f"{low:.3g} to {high:.3g}", hint)


def values_are_free(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and breaks no trace."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():  # make_fx, torch.func.linearize, fake tensors
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def percent(rate: float) -> str:
    """A rate for people: two decimals, or three digits where two decimals would change it."""
    text = f"{rate:.2%}"
    return text if math.isclose(float(text[:-1]) / 100, rate, rel_tol=5e-3) else f"{100 * rate:.3g}%"
