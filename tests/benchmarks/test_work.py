"""The flop accounting against torch's own count of the reference's flops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anomem.ops import conv3x3 as convolutions
from anomem.ops import native
from anomem.testing import gradients
from benchmarks.harness.case import case
from benchmarks.harness.measure import product_flops
from benchmarks.operators import OPERATORS


def counted(one) -> int:
    """Flops of matrix products in the reference, as torch counts them."""
    operator = OPERATORS[one.operator]
    inputs = operator.inputs(one.dims, one.torch_dtype, 0)
    with FlopCounterMode(display=False) as counter:
        if one.training:
            gradients(operator.ours("reference"), inputs)
        else:
            with torch.no_grad():
                operator.ours("reference")(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("one", "reference_does"),
    [
        (case("retrieve", N=96, M=32, d=16, B=8), 1),
        (case("retrieve", N=96, M=32, d=16, B=8, training=False), 1),
        (case("info_nce", R=48, C=80, d=16), 1),
        (case("deviation_map", B=3, d=16, H=4, M=32, training=False), 1),
        (case("downsample", B=2, C=3, H=6, K=5), 1),
        (case("downsample", B=2, C=3, H=6, K=5, training=False), 1),
        # Nine products for each pixel instead of four.
        (case("conv3x3", B=2, C=3, H=6, K=5), 9 / 4),
        (case("conv3x3", B=2, C=3, H=6, K=5, training=False), 9 / 4),
        # The reference does not use that the similarities are symmetric.
        (case("nt_xent", G=3, B=16, d=32), 2),
        (case("nt_xent", G=3, B=16, d=32, training=False), 2),
    ],
    ids=lambda value: value.title if hasattr(value, "title") else str(value),
)
def test_least_flops_are_a_known_part_of_the_reference_s(one, reference_does) -> None:
    assert counted(one) == reference_does * OPERATORS[one.operator].least_work(one).flops


def test_loss_of_a_scale_is_the_sum_of_its_parts() -> None:
    one = case("memory_loss", n=4, B=16, d=32, M=24)
    retrievals = 2 * OPERATORS["retrieve"].least_work(case("retrieve", N=64, M=24, d=32)).flops
    contrasts = 2 * OPERATORS["nt_xent"].least_work(case("nt_xent", G=4, B=16, d=32)).flops
    assert OPERATORS["memory_loss"].least_work(one).flops == retrievals + contrasts
    assert counted(one) == retrievals + 2 * contrasts


@pytest.mark.parametrize("name", ["gather", "variance"])
def test_sampling_has_bytes_and_no_products(name) -> None:
    sizes = {"gather": {"B": 4, "C": 8, "H": 4, "n": 3}, "variance": {"G": 3, "B": 8, "d": 16}}[name]
    work = OPERATORS[name].least_work(case(name, **sizes))
    assert work.flops == 0
    assert work.bytes > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_training_is_more_work_than_inference(name) -> None:
    sizes = {"N": 64, "M": 8, "d": 16, "B": 4, "G": 2, "R": 8, "C": 8, "H": 4, "K": 8, "n": 4}
    forward, both = (OPERATORS[name].least_work(case(name, training=training, **sizes)) for training in (False, True))
    assert both.flops >= forward.flops
    assert both.bytes >= forward.bytes


@pytest.mark.parametrize("training", [False, True])
def test_products_of_the_library_s_convolutions_are_counted(training) -> None:
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    one = case("conv3x3", B=2, C=3, H=6, K=5, training=training)
    x, weight = (
        tensor.requires_grad_(training) for tensor in OPERATORS["conv3x3"].inputs(one.dims, one.torch_dtype, 0)
    )

    def call() -> None:
        out = OPERATORS["conv3x3"].ours("native")(x, weight)
        if training:
            out.sum().backward()

    assert product_flops(call) == OPERATORS["conv3x3"].least_work(one).flops


def test_direct_convolutions_are_counted_as_such(monkeypatch) -> None:
    """In tiles bfloat16 is convolved with nine products for each pixel."""
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(convolutions, "makes_forward", lambda dtype: True)
    one = case("conv3x3", B=2, C=4, H=6, K=6, dtype="bfloat16")
    leaves = [x.requires_grad_() for x in OPERATORS["conv3x3"].inputs(one.dims, one.torch_dtype, 0)]
    flops = product_flops(lambda: OPERATORS["conv3x3"].ours("native")(*leaves).sum().backward())
    assert 4 * flops == 9 * OPERATORS["conv3x3"].least_work(one).flops
