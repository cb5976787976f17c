"""Kernels have names that a profiler can show, and the table of operators names the kernels that each launches."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "kernels"


def jitted() -> list[tuple[str, str]]:
    """(file, name) of every `@triton.jit` function."""
    return [
        (path.stem, node.name)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    ]


def launched() -> list[str]:
    """Names of functions that are launched: `launch_kernel(name, grid, …)`, and nowhere `name[grid](…)`."""
    calls = [
        (path.stem, node)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    own = [file for file, call in calls if isinstance(call.func, ast.Subscript)]
    assert set(own) <= {"launching"}, own  # where `launch_kernel` is
    return [ast.unparse(call.args[0]) for _, call in calls if ast.unparse(call.func) == "launch_kernel"]


def test_what_is_launched_is_called_a_kernel_and_nothing_else_is() -> None:
    names = [name for _, name in jitted()]
    assert len(names) > 30
    assert {name for name in names if name.endswith("_kernel")} == set(launched()) & set(names)
    assert set(launched()) <= set(names)


def test_no_two_names_are_alike() -> None:
    counts = Counter(name for _, name in jitted())
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_kernels_name_says_whose_it_is() -> None:
    """It begins with the name of its file, or of the file's family."""
    for file, name in jitted():
        if name.endswith("_kernel"):
            assert name.startswith((file, file.partition("_")[0], file.removesuffix("s"))), (file, name)


def test_the_tile_table_names_kernels() -> None:
    from anomem.kernels.tile_table import TABLE

    assert {f"{kernel}_kernel" for kernel, _, _ in TABLE} <= {name for _, name in jitted()}


def test_every_kernel_belongs_to_an_operator() -> None:
    from anomem.kernels import OPERATORS

    listed = {kernel for operator in OPERATORS.values() for kernel in operator.kernels}
    assert listed == {name for _, name in jitted() if name.endswith("_kernel")}


def test_operators_launch_the_kernels_that_the_table_names() -> None:
    """Over shapes and dtypes that reach every scheme; nothing is run."""
    from anomem import kernels
    from anomem.kernels.shipped_kernels import empty, recording

    launches: dict[str, list[str]] = {operator: [] for operator in kernels.OPERATORS}

    def call(operator: str, *arguments: object) -> tuple[torch.Tensor, ...]:
        operator = f"anomem::triton_{operator}"
        with recording() as found:
            results: tuple[torch.Tensor, ...] = kernels.implementation(operator)(*arguments)
        launches[operator] += [launch.kernel.__name__ for launch in found]
        return results

    half, exact = torch.bfloat16, torch.float32
    for dtype, d, prototypes in ((half, 64, 40), (half, 512, 40), (half, 512, 400), (exact, 64, 40)):
        query, keys = empty(100, d, dtype=dtype), empty(prototypes, d, dtype=dtype)
        out, lse, normaliser = call("retrieve_fwd", query, keys, None, None, 1.0, 1)
        call("retrieve_bwd", query, None, query, keys, None, None, 1.0, 1, out, lse, normaliser)
    for groups, dtype, d in itertools.product((1, 8), (half, exact), (64, 512)):  # with and without splits
        view, columns = empty(groups, 32, d, dtype=dtype), empty(groups, 64, d, dtype=dtype)
        index = empty(32, dtype=torch.int64)
        rows, *kept = call("nt_xent_fwd", view, view, None, 0.2)
        call("nt_xent_bwd", rows, rows, *kept, None, 0.2, d)
        loss, *kept = call("info_nce_fwd", view, columns, index, None, None, 0.2)
        call("info_nce_bwd", loss, loss, *kept, index, None, None, 0.2, d)
    x, memory = empty(1, 100, 64, dtype=half), empty(1, 40, 64, dtype=half)
    call("nearest", x, memory, 3)
    call("k_center", x[0], 5, 0)
    call("read", x, memory, None, 1.0, None, 1, 3, True, True)
    for operator, names in launches.items():
        assert set(names) == set(kernels.OPERATORS[operator].kernels), operator


def test_an_operator_without_an_implementation_is_an_error() -> None:
    from anomem.kernels import implementation

    with pytest.raises(KeyError, match="triton_deviation_map"):
        implementation("anomem::triton_deviation_map")
