"""Headers outside the instruction sets' namespaces are compiled before any target pragma.

The linker keeps one copy of an inline function. If that copy was compiled for AVX2 it may fail on other processors.
"""

from __future__ import annotations

import re
from pathlib import Path

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"


def included(file: str) -> set[str]:
    """The headers of csrc/cpu that a file includes, directly or not."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        for name in re.findall(r'#include "cpu/(\w+\.h)"', (CPU / waiting.pop()).read_text()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def is_shared(header: str) -> bool:
    return "namespace anomem::cpu {" in (CPU / header).read_text()


def test_shared_headers_come_first() -> None:
    shared = {header for header in included("kernels.h") if is_shared(header)}
    assert len(shared) > 5
    assert shared <= included("arguments.h")
    assert all(is_shared(header) for header in included("arguments.h"))


def test_every_instruction_set_includes_them_first() -> None:
    sources = sorted(CPU.glob("isa_*.cpp"))
    assert len(sources) == 4
    for source in sources:
        lines = [line for line in source.read_text().splitlines() if line.startswith("#")]
        assert lines[0] == '#include "cpu/arguments.h"', source.name
