"""What nvcc makes of every CUDA kernel: registers, spills, shared memory, 16-byte accesses.

`python -m tests.cuda.registers` prints them, with `--write` it rewrites csrc/cuda/registers.json, the committed table.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc" / "cuda" / "registers.json"
ARCHITECTURES = ("sm_80", "sm_90")


class Usage(NamedTuple):
    """One kernel on one architecture."""

    registers: int
    """Per thread."""
    shared: int
    """Bytes per block."""
    spilled: int
    """Bytes of local memory stored or loaded because registers ran out, and of stack."""
    wide_loads: int
    """Loads of 16 bytes in the PTX."""
    wide_stores: int


def compiler() -> str | None:
    """The nvcc to use, or None."""
    return shutil.which("nvcc")


def measure() -> dict[str, dict[str, Usage]]:
    """Compile tests/cuda/instantiations.cu.

    Returns:
        kernel → architecture → usage.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(compiler()), "-std=c++17", "-O3", "-Xptxas=-v", "-fatbin", f"-I{ROOT / 'csrc'}"]
        for architecture in ARCHITECTURES:
            number = architecture.removeprefix("sm_")
            command.append(f"-gencode=arch=compute_{number},code={architecture}")
        command += ["--keep", f"--keep-dir={scratch}", "-o", f"{scratch}/kernels.fatbin"]
        command.append(str(ROOT / "tests" / "cuda" / "instantiations.cu"))
        report = subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch).stderr
        accesses = {}
        for architecture in ARCHITECTURES:
            (file,) = Path(scratch).glob(f"*{architecture.removeprefix('sm_')}*.ptx")
            accesses[architecture] = wide_accesses(file.read_text())
    table: dict[str, dict[str, Usage]] = {}
    for (symbol, architecture), (registers, shared, spilled) in parse(report).items():
        usage = Usage(registers, shared, spilled, *accesses[architecture][symbol])
        table.setdefault(kernel_name(symbol), {})[architecture] = usage
    return dict(sorted(table.items()))


def parse(report: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(mangled name, architecture) → (registers, shared bytes, spilled bytes) from what `ptxas -v` prints."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\w+)' for '(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if head is None or registers is None or spills is None:
            raise ValueError(f"this nvcc reports in another form: {part[:300]}")
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = sum(int(number) for number in spills.groups())
        found[head[1], head[2]] = (int(registers[1]), int(shared[1]) if shared else 0, spilled)
    return found


def wide_accesses(ptx: str) -> dict[str, tuple[int, int]]:
    """Mangled name → number of 16-byte loads and stores in its PTX."""
    counts = {}
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", part)
        assert name is not None
        counts[name[0]] = tuple(
            len(re.findall(rf"\b{access}\.global\.(?:\w+\.)*v4\.", part)) for access in ("ld", "st")
        )
    return counts  # type: ignore[return-value]


def kernel_name(symbol: str) -> str:
    """`Softmax<bf16, 32>` from the mangled name of its entry."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    name = name.split("entry<", 1)[1].rsplit(">(", 1)[0].replace("anomem::cuda::", "")
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "half").strip()


def committed() -> dict[str, dict[str, dict[str, int]]]:
    """The table in csrc/cuda: kernel → architecture → registers and shared bytes."""
    kernels: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text())["kernels"]
    return kernels


def main() -> None:
    """Print the usage of every kernel, or write the table."""
    table = measure()
    if "--write" in sys.argv:
        rows = []
        for kernel, usages in table.items():
            row = {a: {"registers": u.registers, "shared": u.shared} for a, u in usages.items()}
            rows.append(f"    {json.dumps(kernel)}: {json.dumps(row)}")
        about = (
            "Registers per thread and bytes of shared memory per block; rewrite: python -m tests.cuda.registers --write"
        )
        body = ",\n".join(rows)
        TABLE.write_text(f'{{\n  "about": {json.dumps(about)},\n  "kernels": {{\n{body}\n  }}\n}}\n')
    for kernel, usages in table.items():
        for architecture, usage in usages.items():
            print(f"{kernel:40} {architecture} {usage}")


if __name__ == "__main__":
    main()
