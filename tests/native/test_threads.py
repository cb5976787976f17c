"""Every native operator gives the same bits with any number of threads, in both passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from anomem.functional import (
    BlockwiseNTXent,
    ViewParameters,
    augment,
    batch_norm,
    conv3x3,
    deviation_map,
    downsample,
    gather_positions,
    hopfield_retrieve,
    info_nce,
    memory_diagnostics,
    nt_xent,
    variance_hinge,
)
from anomem.testing import draw, gradients


def assert_same_bits(run: Callable[[], Sequence[Tensor]]) -> None:
    """Every result of `run`, with one to three threads and with one again."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shrink", [None, 0.0, 0.02])
@pytest.mark.parametrize("sizes", [(5, 3, 7, 4), (1300, 70, 24, 0), (1300, 70, 24, 9), (300, 600, 33, 9)])
def test_retrieve(sizes: tuple[int, int, int, int], shrink: float | None) -> None:
    """With `shrink` by the operator that has a threshold and an entropy."""
    n, m, d, dv = sizes
    values = draw(m, dv, seed=3) if dv else None
    inputs = [draw(n, d, seed=1), draw(m, d, seed=2), values, torch.tensor(0.7)]

    def run(query: Tensor, prototypes: Tensor, v: Tensor | None, beta: Tensor) -> tuple[Tensor, ...]:
        options = {} if shrink is None else {"shrink": shrink, "return_entropy": True}
        return hopfield_retrieve(query, prototypes, values=v, beta=beta, return_lse=True, impl="native", **options)

    assert_same_bits(lambda: gradients(run, inputs))


@pytest.mark.parametrize("shape", [(1, 300, 20), (5, 40, 33)])
def test_nt_xent(shape: tuple[int, int, int]) -> None:
    views = [draw(*shape, seed=seed) for seed in (1, 2)]
    assert_same_bits(lambda: gradients(lambda a, b: nt_xent(a, b, reduction="none", impl="native"), views))


def test_info_nce() -> None:
    sides = [draw(1, n, 20, seed=n) for n in (300, 500)]
    assert_same_bits(lambda: gradients(lambda a, b: info_nce(a, b, torch.arange(300), impl="native"), sides))


@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_a_contrast_by_blocks(tau: float) -> None:
    views = [draw(500, 20, seed=seed) for seed in (1, 2)]

    def run() -> list[Tensor]:
        contrast = BlockwiseNTXent(
            lambda some: (views[0][some], views[1][some]), 500, temperature=tau, block=300, impl="native"
        )
        return [contrast.loss, *contrast.gradients(0), *contrast.gradients(1)]

    assert_same_bits(run)


@pytest.mark.parametrize("per_image", [False, True])
def test_gather_and_variance(per_image: bool) -> None:
    shape = (5, 70) if per_image else (70,)
    positions = torch.randint(36, shape, generator=torch.Generator().manual_seed(7))

    def chain(feature_map: Tensor) -> Tensor:
        vectors = gather_positions(feature_map, positions, normalize=True, impl="native")
        return variance_hinge(vectors, gamma=0.5, impl="native")

    assert_same_bits(lambda: gradients(chain, [draw(5, 100, 6, 6)]))


def test_deviation_map_and_usage() -> None:
    feature_map, query, prototypes = draw(3, 24, 20, 20), draw(1300, 24, seed=2), draw(70, 24, seed=1)
    assert_same_bits(
        lambda: [
            deviation_map(feature_map, prototypes, impl="native"),
            *memory_diagnostics(query, prototypes, impl="native"),
        ]
    )


def test_augment() -> None:
    images = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    matrices, ones = torch.eye(2, 3) + draw(10, 2, 3, scale=0.2), torch.ones(10)
    parameters = ViewParameters(matrices, 1.1 * ones, 0.9 * ones, 0.8 * ones, ones, 0.1 * ones, torch.arange(10))
    assert_same_bits(lambda: [augment(images, parameters, impl="native")])


@pytest.mark.parametrize("channels", [16, 70])
def test_batch_norm(channels: int) -> None:
    inputs = [
        draw(9, channels, 30, 31),
        draw(channels, seed=1),
        draw(channels, seed=2),
        draw(9, channels, 30, 31, seed=3),
    ]

    def run(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, add=add, relu=True, impl="native")

    assert_same_bits(lambda: gradients(run, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(16, 31), (70, 18), (200, 4)])
def test_conv3x3(channels: int, side: int, dtype: torch.dtype) -> None:
    inputs = [draw(9, channels, side, side, dtype=dtype), draw(65, channels, 3, 3, dtype=dtype, seed=1)]
    assert_same_bits(lambda: gradients(lambda x, weight: conv3x3(x, weight, impl="native"), inputs))


@pytest.mark.parametrize("channels", [16, 70])
def test_the_sample_of_a_map(channels: int) -> None:
    downsample(draw(1, 1, 1, 1), draw(1, 1, 3, 3), draw(1, 1, 1, 1), impl="native")  # registers the operators
    x = draw(9, channels, 31, 30).contiguous(memory_format=torch.channels_last)

    def run() -> list[Tensor]:
        after, sampled = x.clone(), torch.ops.anomem.native_downsample_take(x)
        torch.ops.anomem.native_downsample_add(after, sampled)
        return [sampled, after]

    assert_same_bits(run)
