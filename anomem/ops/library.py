"""The `anomem::` operator library: how an operator is declared, and what the operators share.

Schemas and fakes exist whether or not a kernel can run here. `anomem.kernels` has the table of the operators that run
Triton kernels; csrc/ registers the native ones.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomem.reference.retrieve import Normalize
from anomem.reference.retrieve import in_forward_mode as in_forward_mode

LIBRARY = torch.library.Library("anomem", "DEF")

NORMALIZE_CODES: dict[Normalize, int] = {"none": 0, "layer": 1, "l2": 2}
"""What kernels receive for `normalize`; the order is that of csrc/ and kernels/."""

Fake = Callable[..., Any]


class Memory(NamedTuple):
    """What `softmax(scale · beta · norm(q) norm(K)ᵀ) V` takes beside the queries."""

    keys: Tensor
    """K [M, d], not yet normalised."""
    values: Tensor | None
    """V [M, dv]; None for V = norm(K)."""
    beta: Tensor | None
    """0-dim, learned; None for a constant."""
    scale: float
    """Factor on beta, or the constant itself."""
    normalize: Normalize
    """"layer", "l2" or "none", of queries and keys."""

    @property
    def inverse_temperature(self) -> float | Tensor:
        """scale · beta, as the reference takes it."""
        if self.beta is None:
            return self.scale
        return self.beta if self.scale == 1 else self.scale * self.beta

    @property
    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, float, int]:
        """(keys, values, beta, scale, normalize) as the operators take them."""
        return self.keys, self.values, self.beta, self.scale, NORMALIZE_CODES[self.normalize]


@functools.cache
def _kernels() -> Any:
    """`anomem.kernels`, which needs Triton."""
    return importlib.import_module("anomem.kernels")


def define(name: str, schema: str, fake: Fake, scheduled: Sequence[str] = ()) -> None:
    """Declare `anomem::name`, and let it run `anomem.kernels.implementation` if it is an operator of Triton's.

    Args:
        name: "<backend>_<operator>_<fwd|bwd>".
        schema: arguments and results. A tensor that it changes is marked `(a!)`; no result is an alias.
        fake: gives results of the right shape and dtype without values, from arguments as in the schema.
        scheduled: float arguments that an overload `anomem::name.scheduled` takes as 0-dim CPU tensors, so that one
            compiled graph serves all numbers.
    """
    LIBRARY.define(name + schema)
    torch.library.register_fake(f"anomem::{name}", fake, lib=LIBRARY)
    if scheduled:
        _define_scheduled(name, schema, fake, scheduled)
    if name.startswith("triton_"):
        operator = f"anomem::{name}"

        def run(*args: Any) -> Any:
            return _kernels().implementation(operator)(*args)

        # CPU tensors run in Triton's interpreter, which `anomem.backends` admits only when it is switched on.
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, key)


def _define_scheduled(name: str, schema: str, fake: Fake, scheduled: Sequence[str]) -> None:
    arguments = [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(", ")]
    positions = {arguments.index(argument) for argument in scheduled}
    for argument in scheduled:
        schema = schema.replace(f"float {argument}", f"Tensor {argument}")
    LIBRARY.define(f"{name}.scheduled{schema}")
    torch.library.register_fake(f"anomem::{name}.scheduled", fake, lib=LIBRARY)

    def run(*args: Any) -> Any:
        numbers = (arg.item() if i in positions else arg for i, arg in enumerate(args))
        return getattr(torch.ops.anomem, name).default(*numbers)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(f"{name}.scheduled", run, key)


def overload(packet: Any, *numbers: float | Tensor) -> Any:
    """The `scheduled` overload of an operator where one of its numbers is a tensor, else the default one."""
    return packet.scheduled if any(isinstance(number, Tensor) for number in numbers) else packet.default


def operator(name: str, backend: str) -> Any:
    """`anomem::<backend>_<name>`.

    Args:
        name: "<operator>_<fwd|bwd>".
        backend: "native" or "triton".
    """
    return getattr(torch.ops.anomem, f"{backend}_{name}")


def call(name: str, backend: str, *args: Any) -> Any:
    """`operator(name, backend)(*args)`; where nothing traces, records or transforms, Triton's function itself.

    The dispatcher's way from C++ to Python and back takes 6 to 15 µs a call.
    """
    if backend == "triton" and _nothing_looks_on(args):
        return _kernels().run(f"anomem::triton_{name}", *args)
    return operator(name, backend)(*args)


def _nothing_looks_on(args: Sequence[Any]) -> bool:
    c = torch._C
    if torch.compiler.is_compiling() or c._len_torch_dispatch_stack() or c._is_tracing():
        return False
    if c._are_functorch_transforms_active() or c._autograd._profiler_enabled():
        return False
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    plain = all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in tensors)
    return plain and (tensors[0].is_cuda or tensors[0].is_cpu) and not is_batched(*tensors)


def apply(function: Any, *args: Any) -> Any:
    """`function.apply`, in the fewest steps: of a small call they take longer than its arithmetic.

    Args:
        function: an autograd function whose `forward` and `setup_context` are apart, as torch.func and torch.compile
            want them.
        args: all arguments of its `forward`.
    """
    if torch.compiler.is_compiling():
        return function.apply(*(_seen_anew(arg) for arg in args))
    if _is_watched():
        return function.apply(*args)
    if _wants_gradients(args):
        return _in_one_step(function).apply(*args)
    return function.forward(*args)


def _seen_anew(arg: Any) -> Any:
    """A tensor as a view, which the compiler looks at anew.

    Of an argument of torch.func.grad it knows `requires_grad` from before, and would lose the function's gradient.
    """
    return arg.view_as(arg) if isinstance(arg, Tensor) and arg.is_floating_point() else arg


@functools.cache
def _in_one_step(function: Any) -> Any:
    """The function with a forward pass that sets up its context itself, which torch runs in fewer steps."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    passes = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), passes)


def _is_watched() -> bool:
    """Whether a compiler traces, or torch.func or forward mode transforms the call."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or in_forward_mode()


def _wants_gradients(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def may_be_differentiated(args: Sequence[Any]) -> bool:
    """Whether a gradient of a call may be asked for, or the call is traced or transformed."""
    return _is_watched() or _wants_gradients(args)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype in which kernels accumulate and give losses: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def unit_inner_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def channels_last(x: Any) -> Any:
    """A map [B, C, H, W] as B·H·W adjacent rows of C channels, copied where it is not; None stays None."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def contiguous(tensors: Sequence[Any]) -> list[Any]:
    """Saved tensors as the kernels read them: a saved-tensors hook may give back other strides than it was given."""
    return [None if x is None else x.contiguous() for x in tensors]


def empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous uninitialised tensor on the device of `like`, for fakes."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def empty_scalar(value: Tensor | None, like: Tensor) -> Tensor:
    """What a fake gives for the gradient of an optional 0-dim input: empty where there is no such input."""
    return empty(like, dtype=accumulator(like)) if value is not None else empty(like, 0, dtype=accumulator(like))


def vmap(
    apply: Callable[..., tuple[Tensor, ...]], folded: int, info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of `torch.func.vmap` for an operator that has a batch axis of its own.

    Args:
        apply: the autograd function's, giving a tuple whose tensors begin with the batch axis.
        folded: of how many leading arguments the mapped axis is folded into the first one. Where another argument is
            mapped too (a memory for each element), the operator is called once for each element.
        info, in_dims, args: what `torch.autograd.Function.vmap` receives.
    """
    size = info.batch_size
    if any(dim is not None for dim in in_dims[folded:]):
        pairs = list(zip(args, in_dims, strict=True))
        if size == 0:  # one call with zeros tells the shapes
            zeros = (a if dim is None else a.new_zeros(_without(a.shape, dim)) for a, dim in pairs)
            outs = apply(*zeros)
            return tuple(out.new_empty(0, *out.shape) for out in outs), (0,) * len(outs)
        results = [apply(*(a if dim is None else a.select(dim, i) for a, dim in pairs)) for i in range(size)]
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
    batched = [
        x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        for x, dim in zip(args[:folded], in_dims[:folded], strict=True)
    ]  # [V, batch, ...] each
    outs = apply(*(x.flatten(0, 1).contiguous() for x in batched), *args[folded:])
    return tuple(out.unflatten(0, batched[0].shape[:2]) for out in outs), (0,) * len(outs)


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != dim]


def wants_graph() -> bool:
    """Whether the running backward pass must itself be differentiable: `create_graph=True`, or forward mode over it.

    A compiled backward never is, so there the kernels always run.
    """
    return (torch.is_grad_enabled() or in_forward_mode()) and not torch.compiler.is_compiling()


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether one of them stands for a batch, as an upstream gradient of `is_grads_batched=True`: it has no storage."""
    if torch.compiler.is_compiling():
        return False
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is on: an operator that writes in place has no rule for it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiable_gradients(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that carry a graph of their own, for a double backward: those of the reference.

    Args:
        reference: gives one tensor or a tuple matching `grad_outputs`; called with inputs in the accumulation dtype.
        inputs: its inputs, None where optional ones are absent.
        needed: which inputs want a gradient.
        grad_outputs: upstream gradients, None for outputs that were not used.

    Returns:
        One entry per input, None where not needed.
    """
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    used = [(i, grad) for i, grad in enumerate(grad_outputs) if grad is not None]

    def of_wanted(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = iter(leaves)
        tensors = [next(given) if n and x is not None else x for x, n in zip(inputs, needed, strict=True)]
        outputs = reference(*(None if x is None else x.to(accumulator(x)) for x in tensors))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(outputs[i].to(grad.dtype) for i, grad in used)

    # Not torch.autograd.grad: under torch.func the saved inputs may have left the level at which they required one.
    with torch.autocast(wanted[0].device.type, enabled=False):
        pullback = torch.func.vjp(of_wanted, *wanted)[1]
        grads = iter(pullback(tuple(grad for _, grad in used)))
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
