"""`python -m benchmarks.touch`: every kernel of the library once, small, forward and backward; for sanitizers.

Numbers are checked by the tests, not here. Sizes are odd, so that last tiles are not full.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.harness.case import case
from benchmarks.harness.console import say
from benchmarks.harness.rows import Unavailable
from benchmarks.operators import OPERATORS
from benchmarks.rivals.ours import build

SIZES = {"N": 77, "M": 37, "d": 48, "B": 21, "G": 3, "R": 45, "C": 48, "H": 7, "n": 5}


@dataclass(frozen=True)
class Options:
    """Which kernels."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where to run."""
    impl: Literal["native", "triton"] = "native"
    """Whose kernels."""


def main(options: Options) -> int:
    """Run; print what ran, and why the others could not."""
    if options.device == "cuda" and not torch.cuda.is_available():
        say("--device cuda: torch finds no CUDA device")
        return 2
    ran = 0
    for operator in OPERATORS.values():
        for dtype in ("float32", "bfloat16"):
            one = case(operator.name, dtype=dtype, **SIZES)
            inputs = [x.to(options.device) for x in operator.inputs(one.dims, one.torch_dtype, 0)]
            floating = [x.requires_grad_() for x in inputs if x.is_floating_point()]
            try:
                out = build(options.impl, one, options.device)(*inputs)
            except Unavailable as reason:
                say(f"{operator.name} {dtype}: {reason}")
                continue
            if out.requires_grad:
                torch.autograd.grad(out.sum(), floating)
            if options.device == "cuda":
                torch.cuda.synchronize()
            say(f"{operator.name} {dtype}: ran")
            ran += 1
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.touch", description=__doc__)))
