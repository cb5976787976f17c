"""What is compiled ahead of time: each kernel file's `specs(architecture)` yields these."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from anomem.kernels.tiles import Tile


class Spec(NamedTuple):
    """One kernel with one tile, as `triton.compile` wants it."""

    name: str
    """"<kernel> <variant> d<BLOCK_D> <rows>x<columns>": the key of the committed table."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: dict[str, str]
    """Every argument in order: "*bf16", "*fp32", "i32", "fp32", or "constexpr"."""
    constants: dict[str, Any]
    """Values of the constexpr arguments and of absent (None) tensors."""
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16 in the launches that matter."""
    tile: Tile
    matrix: bool
    """Whether it multiplies matrices: then losing the architecture's matrix instruction is a failure."""


def spec(
    name: str,
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    tile: Tile,
    matrix: bool = True,
) -> Spec:
    """A Spec whose signature follows the kernel's own argument order.

    Pointers, and 32-bit integers named *stride, are taken as multiples of 16.

    Args:
        name: kernel and variant; the tile is appended.
        kernel: the `@triton.jit` function.
        arguments: type of each run-time argument.
        constants: value of each constexpr argument, and None for each absent tensor.
        tile: rows, columns, warps, stages.
        matrix: see `Spec`.
    """
    signature = {argument: arguments.get(argument, "constexpr") for argument in names(kernel)}
    missing = [argument for argument, kind in signature.items() if kind == "constexpr" and argument not in constants]
    extra = set(arguments) - set(signature) | set(constants) - set(signature)
    if missing or extra:
        raise ValueError(f"{name}: no type for {missing}, no argument called {sorted(extra)}")
    aligned = tuple(a for a, kind in signature.items() if kind.startswith("*") or a.endswith("stride"))
    full = f"{name} {tile.rows}x{tile.columns}"
    return Spec(full, kernel, signature, dict(constants), aligned, tile, matrix)


def names(kernel: Any) -> list[str]:
    """The argument names of a `@triton.jit` function."""
    return list(kernel.arg_names)
