"""`benchmarks.counts` on stand-in GPUs. test_stand_in.py runs these cases."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.counts import count
from benchmarks.harness import rows
from benchmarks.harness.case import Function, Implementation, case
from benchmarks.rivals import implementations

SMALL = case("nt_xent", G=4, B=64, d=32, dtype="bfloat16")


def made_of(function: Function) -> Implementation:
    return Implementation("this", "nt_xent", lambda case, device: function)


def test_kernels_and_bytes_are_those_of_a_call() -> None:
    counted = count(SMALL, made_of(lambda z, z_pair: (z * 2 + z_pair).sum()))
    # A multiplication, an addition and a sum; backward a multiplication, by 2. At the peak two tensors are alive.
    one = SMALL.dims["G"] * SMALL.dims["B"] * SMALL.dims["d"] * SMALL.torch_dtype.itemsize
    assert (counted.status, counted.launches, counted.peak_bytes) == (rows.COUNTED, 4, 2 * one)


def test_the_kernels_launch_less_and_take_less_than_eager() -> None:
    eager, triton = (
        count(SMALL, implementation)
        for name in ("eager", "triton")
        for implementation in implementations("nt_xent")
        if implementation.name == name
    )
    assert eager.launches is not None
    assert triton.launches is not None
    assert triton.launches < eager.launches / 5
    assert eager.peak_bytes is not None
    assert triton.peak_bytes is not None
    assert triton.peak_bytes < eager.peak_bytes / 5


def test_what_reads_a_computed_value_is_left_out() -> None:
    def reads(z: Tensor, z_pair: Tensor) -> Tensor:
        return (z + z_pair).sum() * float(z.detach()[0, 0, 0])

    counted = count(SMALL, made_of(reads))
    assert (counted.status, counted.launches, counted.peak_bytes) == (rows.UNAVAILABLE, None, None)


def test_what_does_not_fit_is_out_of_memory() -> None:
    def large(z: Tensor, z_pair: Tensor) -> Tensor:
        return z.new_zeros(81 * 2**30, dtype=torch.uint8).sum() + z.sum() + z_pair.sum()

    assert count(SMALL, made_of(large)).status == rows.OUT_OF_MEMORY
