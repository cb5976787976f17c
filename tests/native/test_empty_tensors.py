"""Axes of length zero: results and gradients of every native function agree with the reference's.

The data pointer of an empty tensor may be null, so a kernel must not read "not given" from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anomem.functional import (
    conv3x3,
    deviation_map,
    gather_positions,
    hopfield_retrieve,
    info_nce,
    memory_diagnostics,
    nt_xent,
    variance_hinge,
)
from anomem.testing import compare, draw

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", ["layer", "l2", "none"])
@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"shrink": 0.05, "return_entropy": True}], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 7, 0), (300, 70, 33, 0), (0, 3, 7, 0), (0, 3, 7, 4), (5, 3, 2, 0)], ids=str)
def test_retrieve(dtype: torch.dtype, normalize: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Values of width 0 are values: the prototypes' gradient has no part of theirs."""
    n, m, d, dv = shape

    def run(impl: Any) -> Callable[..., Any]:
        return lambda q, k, v: hopfield_retrieve(
            q, k, values=v, beta=0.4, normalize=normalize, return_lse=True, impl=impl, **options
        )

    inputs = [draw(n, d, dtype=dtype), draw(m, d, dtype=dtype, seed=1), draw(m, dv, dtype=dtype, seed=2)]
    compare(run("native"), run("reference"), inputs)


def test_values_of_width_zero_with_a_learned_beta() -> None:
    def run(impl: Any) -> Callable[..., Any]:
        return lambda q, k, v, beta: hopfield_retrieve(q, k, values=v, beta=beta, return_lse=True, impl=impl)

    compare(run("native"), run("reference"), [draw(9, 6), draw(4, 6, seed=1), draw(4, 0), torch.tensor(0.7)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "positions"),
    [((0, 3, 2, 2), [1, 0]), ((2, 0, 2, 2), [1, 0]), ((2, 3, 2, 2), []), ((2, 3, 0, 2), []), ((2, 3, 2, 2), [[], []])],
    ids=str,
)
def test_gather(
    dtype: torch.dtype, normalize: bool, channels_last: bool, shape: tuple[int, ...], positions: list[Any]
) -> None:
    index = torch.tensor(positions, dtype=torch.int64)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def run(impl: Any) -> Callable[..., Any]:
        return lambda x: gather_positions(x.contiguous(memory_format=layout), index, normalize=normalize, impl=impl)

    compare(run("native"), run("reference"), [draw(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variance_of_no_groups(dtype: torch.dtype) -> None:
    def run(impl: Any) -> Callable[..., Any]:
        return lambda x: variance_hinge(x, reduction="none", impl=impl)

    compare(run("native"), run("reference"), [draw(0, 4, 5, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_nt_xent(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def run(impl: Any) -> Callable[..., Any]:
        return lambda z, z_pair: nt_xent(z, z_pair, reduction="none", impl=impl)

    compare(run("native"), run("reference"), [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_info_nce_without_rows(dtype: torch.dtype, with_exclude: bool, groups: int) -> None:
    """`exclude` is then an empty tensor, which is not an absent one."""
    positive = torch.arange(0)
    exclude = positive if with_exclude else None

    def run(impl: Any) -> Callable[..., Any]:
        return lambda x, y: info_nce(x, y, positive, exclude, reduction="none", impl=impl)

    compare(run("native"), run("reference"), [draw(groups, 0, 4, dtype=dtype), draw(groups, 3, 4, dtype=dtype, seed=1)])


def test_the_contrast_operators_without_features() -> None:
    """The functions ask for at least one feature; the operators must not read any of none."""
    operators = torch.ops.anomem
    z, positive = torch.zeros(2, 3, 0), torch.arange(3)
    assert nt_xent(draw(3, 4), draw(3, 4, seed=1), impl="native").isfinite()
    rows, total, inv_norm = operators.native_nt_xent_fwd(z, z, None, 0.2)
    assert torch.allclose(rows, torch.full((2, 6), 5.0).log())
    dz, dz_pair, _ = operators.native_nt_xent_bwd(rows, z, z, rows, total, inv_norm, None, 0.2)
    assert dz.shape == dz_pair.shape == z.shape
    loss, total, *norms = operators.native_info_nce_fwd(z, z, positive, None, None, 0.2)
    assert torch.allclose(loss, torch.full((2, 3), 3.0).log())
    drows, dcolumns, _ = operators.native_info_nce_bwd(loss, z, z, loss, total, *norms, positive, None, None, 0.2)
    assert drows.shape == dcolumns.shape == z.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 2), (2, 4, 2, 0)], ids=str)
def test_deviation_map_of_no_positions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    feature_map, prototypes = draw(*shape, dtype=dtype), draw(3, 4, dtype=dtype, seed=1)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    options: list[dict[str, Any]] = [{}, {"values": draw(3, 4, dtype=dtype, seed=2)}]
    options.append({"log_prior": torch.zeros(shape[2] * shape[3], 3, dtype=sums)})
    for given in options:
        result = deviation_map(feature_map, prototypes, impl="native", **given)
        assert result.shape == (shape[0], *shape[2:])
        assert result.dtype == sums


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 3, 0), (1, 4, 0, 3)], ids=str)
def test_the_gradient_of_a_convolution_over_no_pixels(shape: tuple[int, ...]) -> None:
    """The function leaves such maps to torch; the operator divides by none of their sizes."""
    conv3x3(draw(1, 8, 4, 4).to(memory_format=torch.channels_last), draw(8, 8, 3, 3), impl="native")
    x, grad = (torch.zeros(shape[0], c, *shape[2:]).to(memory_format=torch.channels_last) for c in (shape[1], 6))
    dweight = torch.ops.anomem.native_conv3x3_weight(x, grad)
    assert dweight.shape == (6, shape[1], 3, 3)
    assert not dweight.any()


def test_the_operator_counts_no_queries() -> None:
    """`memory_diagnostics` asks for at least one query; the operator must not read any of none."""
    assert memory_diagnostics(draw(1, 4), draw(3, 4, seed=1), impl="native") is not None
    count, _mass, entropy, _direction = torch.ops.anomem.native_usage(draw(0, 4), draw(3, 4, seed=1), None, 0.5, 1)
    assert count.tolist() == [0, 0, 0]
    assert entropy.shape == (0,)
