"""Launches of Triton kernels with little work on the host.

Triton takes apart all arguments in Python at each launch. What they decide is little: dtypes, alignments, and which
integers are 1 or a multiple of 16. With the same of these the compiled kernel of an earlier launch is run.
"""

import threading
from typing import Any, NamedTuple

import triton

from anomem.kernels.primitives import INTERPRETING


class _Signature(NamedTuple):
    """What a kernel's arguments are."""

    kernel: Any
    count: int
    """Of the arguments at run time, which come first."""
    specialised: tuple[bool, ...]
    """Whether Triton compiles anew for an integer that is 1 or a multiple of 16."""
    constants: tuple[str, ...]


class Bound(NamedTuple):
    """A compiled kernel, ready to be launched."""

    run: Any
    """Triton's launcher in C."""
    function: int
    metadata: Any
    constants: tuple[Any, ...]
    """The kernel's last arguments."""
    compiled: Any


class _Recording(threading.local):
    steps: Any = None
    """Of `passes`, where this thread records a pass: its method `launch` takes note of launches."""


recording = _Recording()

# Both by the kernel's id: a `@triton.jit` function hashes its source at each look-up.
_signatures: dict[int, _Signature] = {}
_bound: dict[tuple[Any, ...], Bound] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """`kernel[grid](*arguments, **constants)`, with less to do from the second launch of a kernel on.

    Args:
        kernel: a `@triton.jit` function whose constants (`tl.constexpr`) come last.
        grid: one or two numbers of programs.
        arguments: tensors, integers, floats and None, in the order of the kernel; the first is a tensor.
        constants: constants by name, and options of Triton such as num_warps.

    Returns:
        Triton's compiled kernel; None in the interpreter.
    """
    first = arguments[0]
    if INTERPRETING.value or not first.is_cuda or hooked():  # a profiler's hooks want all that Triton gives them
        return kernel[grid](*arguments, **constants)
    signature = _signatures.get(id(kernel)) or _signature(kernel)
    count = signature.count
    device = first.device.index
    ways: list[Any] = [id(kernel), device, *arguments[count:], *constants, *constants.values()]
    for argument, special in zip(arguments, signature.specialised, strict=False):
        kind = type(argument)
        if kind is int:
            wide = not -(2**31) <= argument < 2**31
            ways.append((wide, argument == 1, argument % 16 == 0) if special else wide)
        elif kind is float or argument is None:
            ways.append(kind)
        else:
            ways.append(argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype,))
    key = tuple(ways)
    bound = _bound.get(key)
    cold = bound is None
    if bound is None:
        compiled = kernel[grid](*arguments, **constants)
        values = dict(zip(signature.constants, arguments[count:], strict=False)) | constants
        tail = tuple(values[name] for name in signature.constants)
        bound = _bound[key] = Bound(compiled.run, compiled.function, compiled.packed_metadata, tail, compiled)
    columns = grid[1] if len(grid) > 1 else 1
    if recording.steps is not None:
        recording.steps.launch(bound, grid[0], columns, arguments[:count])
    if not cold:
        bound.run(
            grid[0],
            columns,
            1,
            current_stream(device),
            bound.function,
            bound.metadata,
            None,
            None,
            None,
            *arguments[:count],
            *bound.constants,
        )
    return bound.compiled


def hooked() -> bool:
    """Whether a profiler has hooks on Triton's launches."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls))


def current_stream(device: int) -> int:
    """The handle of the current stream of a GPU."""
    stream: int = triton.runtime.driver.active.get_current_stream(device)
    return stream


def _signature(kernel: Any) -> _Signature:
    numbers = [not parameter.is_constexpr for parameter in kernel.params]
    specialised = tuple(not parameter.do_not_specialize for parameter in kernel.params)
    count = sum(numbers)
    if not all(numbers[:count]):
        raise ValueError(f"{kernel.__name__}: constants stand after all other arguments")
    found = _Signature(kernel, count, specialised[:count], tuple(kernel.arg_names[count:]))
    return _signatures.setdefault(id(kernel), found)
