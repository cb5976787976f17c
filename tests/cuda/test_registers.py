"""Every CUDA kernel compiles for every architecture without spills, within the registers of the committed table."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.cuda import registers
from tests.cuda.registers import ARCHITECTURES, ROOT, Usage

pytestmark = pytest.mark.skipif(
    registers.compiler() is None or shutil.which("c++filt") is None, reason="needs nvcc to compile the CUDA kernels"
)
# Kernels that read or write no rows: indices, single numbers, planes across their length.
WITHOUT_WIDE_LOADS = {"ListPositions", "ScatterPlanes", "TakePlanes", "VarianceLoss"}
WITHOUT_WIDE_STORES = {"ListPositions", "VarianceLoss", "RowDistance", "RowDots"}


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, Usage]]:
    return registers.measure()


def test_every_kernel_is_measured(usage: dict[str, dict[str, Usage]]) -> None:
    declared = set()
    for source in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        declared |= set(re.findall(r"struct (\w+)(?: : [^{]*)? \{\n  using Arguments", source.read_text()))
    declared -= {"WarpPerRow"}  # what kernels derive from
    assert len(declared) > 10
    assert declared == {kernel.split("<")[0] for kernel in usage}
    assert all(set(architectures) == set(ARCHITECTURES) for architectures in usage.values())


def test_no_kernel_spills(usage: dict[str, dict[str, Usage]]) -> None:
    spilled = {name: found for name, found in usage.items() if any(u.spilled for u in found.values())}
    assert not spilled


def test_registers_stay_within_the_table(usage: dict[str, dict[str, Usage]]) -> None:
    """A kernel that needs more is either made leaner, or the table is rewritten with a reason in the commit."""
    table = registers.committed()
    assert set(table) == set(usage)
    for kernel, architectures in usage.items():
        for architecture, found in architectures.items():
            allowed = table[kernel][architecture]
            assert found.registers <= allowed["registers"], f"{kernel} on {architecture}"
            assert found.shared <= allowed["shared"], f"{kernel} on {architecture}"


def test_rows_move_sixteen_bytes_at_a_time(usage: dict[str, dict[str, Usage]]) -> None:
    for kernel, architectures in usage.items():
        name = kernel.split("<")[0]
        for found in architectures.values():
            assert (found.wide_loads > 0) != (name in WITHOUT_WIDE_LOADS), f"{kernel} loads"
            assert (found.wide_stores > 0) != (name in WITHOUT_WIDE_STORES), f"{kernel} stores"
