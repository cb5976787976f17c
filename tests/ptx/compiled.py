"""Kernels compiled to PTX without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anomem.kernels.shipped_kernels import Spec
from tests.ptx.program import Program, parse


class Compiled(NamedTuple):
    """A kernel that can be run."""

    spec: Spec
    ptx: str
    shared_bytes: int

    @property
    def program(self) -> Program:
        """Of its PTX."""
        return parse(self.ptx)


def compile_spec(spec: Spec) -> Compiled:
    """Compile for the architecture of a spec; Triton's cache keeps the result."""
    source = ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs={name: spec.constants[name] for name, kind in spec.signature.items() if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(spec.signature) if name in spec.aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", spec.architecture, 32), options=spec.options)
    return Compiled(spec, kernel.asm["ptx"], kernel.metadata.shared)
