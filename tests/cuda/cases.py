"""What every CUDA operator must do, on whatever device the fixture `device` gives: a GPU, or the emulation on the CPU.

The operators are called below `anomem.functional`, which would not send CPU tensors to CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import reference
from anomem.ops import deviation_map, retrieve, sampling
from anomem.ops.library import Memory
from anomem.testing import assert_within_budget, compare, draw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["planes", "channels_last", "strided", "misaligned", "misaligned_channels_last"]


def accumulated(x: Tensor) -> Tensor:
    """Widened to the dtype in which kernels accumulate."""
    return x if x.dtype == torch.float64 else x.float()


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, one element past a 16-byte boundary; differentiable."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def in_layout(feature_map: Tensor, layout: str) -> Tensor:
    """A map [B, C, H, W] with other strides or another address; differentiable."""
    if layout == "channels_last":
        return feature_map.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([feature_map, feature_map], dim=-1)[..., 0]
    if layout == "misaligned":
        return misaligned(feature_map)
    if layout == "misaligned_channels_last":
        return misaligned(feature_map.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    return feature_map


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 5, 3, 4), 7), ((2, 40, 13, 21), 9), ((1, 530, 1, 3), 4), ((2, 8, 1, 1), 2)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_gather(
    device: str, dtype: torch.dtype, layout: str, normalize: bool, shape: tuple[int, ...], count: int
) -> None:
    feature_map = draw(*shape, dtype=dtype).to(device)
    batch, _, height, width = shape
    positions = torch.randint(height * width, (batch, count), generator=torch.Generator().manual_seed(3)).to(device)
    positions = positions if normalize else positions[0]
    compare(
        lambda x: sampling.gather_positions(in_layout(x, layout), positions, normalize),
        lambda x: reference.gather_positions(x, positions, normalize=normalize),
        [feature_map],
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_of_repeated_positions_add_up(device: str, per_image: bool) -> None:
    """More positions than one block lists at a time, each many times."""
    positions = torch.randint(5, (2, 600), generator=torch.Generator().manual_seed(0)).to(device)
    positions = positions if per_image else positions[0]
    compare(
        lambda x: sampling.gather_positions(x, positions, True),
        lambda x: reference.gather_positions(x, positions, normalize=True),
        [draw(2, 3, 2, 3).to(device)],
    )


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_positions_outside_of_the_map_give_nan_and_no_gradient(device: str, layout: str, normalize: bool) -> None:
    feature_map = in_layout(draw(2, 6, 2, 3), layout).to(device).requires_grad_()
    positions = torch.tensor([4, -1, 6, 2**40, 0], device=device)
    out = sampling.gather_positions(feature_map, positions, normalize)
    inside = reference.gather_positions(feature_map, positions[[0, 4]], normalize=normalize)
    outside = out[1:4].detach()
    torch.testing.assert_close(outside, torch.full_like(outside, torch.nan), equal_nan=True)
    assert_within_budget(out[[0, 4]].detach(), inside.detach(), inside.detach().double())
    (actual,) = torch.autograd.grad(out[[0, 4]].sum(), feature_map)
    (expected,) = torch.autograd.grad(inside.sum(), feature_map)
    assert_within_budget(actual, expected, expected.double())


def test_a_zero_vector_stays_zero_and_a_nan_stays_a_nan(device: str) -> None:
    feature_map = draw(1, 4, 1, 3).to(device)
    feature_map[..., 1] = 0
    feature_map[:, 2, :, 2] = torch.nan
    feature_map.requires_grad_()
    out = sampling.gather_positions(feature_map, torch.arange(3, device=device), True)
    (gradient,) = torch.autograd.grad(out[:2].sum(), feature_map)
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
    assert out[2].isnan().all()
    assert (gradient[..., 1] == 0).all()


@pytest.mark.parametrize("channels", [6, 530])
def test_vectors_whose_squares_overflow_have_unit_length(device: str, channels: int) -> None:
    """Where channels are adjacent; in maps of planes the code for it would spill registers."""
    feature_map = draw(1, channels, 1, 3)
    long = feature_map * torch.tensor([1e30, 1.0, 2e37])
    expected = reference.gather_positions(feature_map, torch.arange(3), normalize=True)
    out = sampling.gather_positions(in_layout(long, "channels_last").to(device), torch.arange(3, device=device), True)
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("normalize", ["layer", "l2"])
def test_queries_whose_squares_overflow_read_like_short_ones(device: str, normalize: str) -> None:
    query, keys = draw(7, 21), draw(9, 21, seed=1)
    short, long = (
        retrieve.retrieve((query * scale).to(device), Memory(keys.to(device), None, None, 0.3, normalize), "native")
        for scale in (1e3, 1e36)
    )
    for mine, expected in zip(long, short, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 5, 7), (2, 600, 40), (2, 33, 136)], ids=str)
def test_variance(device: str, dtype: torch.dtype, aligned: bool, shape: tuple[int, ...]) -> None:
    compare(
        lambda x: sampling.variance_hinge(x if aligned else misaligned(x), 1.2, 1e-4),
        lambda x: reference.variance_hinge(accumulated(x), 1.2, 1e-4),
        [draw(*shape, dtype=dtype).to(device)],
    )


def test_variance_far_from_the_origin(device: str) -> None:
    """E[x²] − E[x]² would lose every digit here."""
    x = draw(2, 700, 9) + 1000
    compare(lambda x: sampling.variance_hinge(x, 2.0, 1e-4), lambda x: reference.variance_hinge(x, 2.0), [x.to(device)])


def test_variance_of_nan_is_nan(device: str) -> None:
    x = draw(2, 4, 5).to(device)
    x[1, 2, 3] = torch.nan
    loss = sampling.variance_hinge(x, 1.0, 1e-4)
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", ["none", "layer", "l2"])
@pytest.mark.parametrize("options", ["tied", "values", "values_of_width_0", "learned_beta"])
def test_retrieve(device: str, dtype: torch.dtype, normalize: str, options: str) -> None:
    """Three chunks of queries in the emulation, rows whose length is no multiple of 16 bytes."""
    query, keys = draw(300, 21, dtype=dtype), draw(37, 21, dtype=dtype, seed=1)
    widths = {"values": 10, "values_of_width_0": 0}
    values = draw(37, widths[options], dtype=dtype, seed=2) if options in widths else None
    beta = torch.tensor(0.7) if options == "learned_beta" else None
    inputs = [None if x is None else x.to(device) for x in (query, keys, values, beta)]
    scale = 0.3 if beta is None else 1.0

    def kernel(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        return retrieve.retrieve(query, Memory(keys, values, beta, scale, normalize), "native")

    def exact(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        read = reference.hopfield_retrieve(
            query, keys, values=values, beta=scale if beta is None else beta, normalize=normalize
        )
        return read.out, read.lse

    compare(kernel, exact, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retrieve_from_a_large_memory_with_strided_and_misaligned_queries(device: str, dtype: torch.dtype) -> None:
    """Rows of scores that a whole block shares."""

    def kernel(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return retrieve.retrieve(query[:, 1:], Memory(misaligned(keys), None, None, 0.5, "l2"), "native")

    def exact(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        read = reference.hopfield_retrieve(query[:, 1:], keys, beta=0.5, normalize="l2")
        return read.out, read.lse

    compare(kernel, exact, [draw(19, 14, dtype=dtype).to(device), draw(1030, 13, dtype=dtype, seed=1).to(device)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "normalize", "distance"),
    [(layout, "layer", "cosine") for layout in LAYOUTS]
    + [(layout, *rest) for layout in LAYOUTS[:2] for rest in (("none", "l2"), ("l2", "cosine"), ("layer", "l2"))],
)
def test_deviation_map(device: str, dtype: torch.dtype, layout: str, normalize: str, distance: str) -> None:
    """Images that share a chunk in the emulation, and one image in several chunks."""
    for shape, seed in (((3, 19, 4, 5), 0), ((2, 19, 15, 13), 1)):
        feature_map = draw(*shape, dtype=dtype, seed=seed).to(device)
        keys = draw(65, 19, dtype=dtype, seed=2).to(device)
        values = draw(65, 19, dtype=dtype, seed=3).to(device) if normalize == "none" else None
        prior = draw(shape[2] * shape[3], 65, seed=4).to(device) if normalize == "l2" else None
        actual = deviation_map.deviation_map(
            in_layout(feature_map, layout), Memory(keys, values, None, 0.4, normalize), distance, prior
        )

        def exact(*inputs: Tensor | None, distance: str = distance) -> Tensor:
            feature_map, keys, values, prior = inputs
            return reference.deviation_map(
                feature_map, keys, values=values, beta=0.4, normalize=normalize, kind=distance, log_prior=prior
            )

        inputs = (feature_map, keys, values, prior if prior is None else prior.to(dtype))
        plain = exact(*inputs).float()
        truth = exact(*(None if x is None else x.double() for x in (feature_map, keys, values, prior)))
        assert_within_budget(actual, plain, truth)


def test_a_prior_of_zero_excludes_a_prototype(device: str) -> None:
    feature_map, keys = draw(1, 4, 1, 2).to(device), draw(6, 4, seed=1).to(device)
    prior = torch.zeros(2, 6, device=device)
    prior[:, :3] = -torch.inf
    with_prior = deviation_map.deviation_map(feature_map, Memory(keys, None, None, 1.0, "layer"), "l2", prior)
    without = deviation_map.deviation_map(feature_map, Memory(keys[3:], None, None, 1.0, "layer"), "l2", None)
    assert_within_budget(with_prior, without, without.double())


def test_nothing_in_nothing_out(device: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    feature_map = draw(2, 3, 2, 2).to(device).requires_grad_()
    out = sampling.gather_positions(feature_map, nothing, True)
    assert out.shape == (0, 2, 3)
    assert torch.equal(torch.autograd.grad(out.sum(), feature_map)[0], torch.zeros_like(feature_map))
    assert sampling.gather_positions(feature_map[:0], nothing, False).shape == (0, 0, 3)
    assert sampling.variance_hinge(draw(0, 4, 5).to(device), 1.0, 1e-4).shape == (0,)
    query, keys = draw(0, 3).to(device).requires_grad_(), draw(4, 3).to(device).requires_grad_()
    out, lse = retrieve.retrieve(query, Memory(keys, None, None, 1.0, "layer"), "native")
    assert (out.shape, lse.shape) == ((0, 3), (0,))
    assert torch.equal(torch.autograd.grad(out.sum(), keys)[0], torch.zeros_like(keys))
    empty_map = deviation_map.deviation_map(feature_map[:0], Memory(keys.detach(), None, None, 1.0, "l2"), "l2", None)
    assert empty_map.shape == (0, 2, 2)


def operator_calls(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every registered operator with arguments for it."""
    native = torch.ops.anomem
    feature_map = draw(2, 40, 7, 9, dtype=dtype).to(device)
    positions = torch.randint(63, (2, 30), generator=torch.Generator().manual_seed(1)).to(device)
    out, inv_norm = native.native_gather_fwd(feature_map, positions, True)
    x = draw(3, 60, 50, dtype=dtype).to(device)
    _, mean, std = native.native_variance_fwd(x, 1.0, 1e-4)
    query, keys = draw(300, 40, dtype=dtype).to(device), draw(50, 40, dtype=dtype, seed=1).to(device)
    values, beta = draw(50, 12, dtype=dtype, seed=2).to(device), torch.tensor(0.5, device=device)
    read, lse = native.native_retrieve_fwd(query, keys, values, beta, 1.0, 1)
    return {
        "gather_fwd": (native.native_gather_fwd, (feature_map, positions, True)),
        "gather_bwd": (
            native.native_gather_bwd,
            (torch.ones_like(out), out, inv_norm, positions, list(feature_map.shape), False, True),
        ),
        "variance_fwd": (native.native_variance_fwd, (x, 1.0, 1e-4)),
        "variance_bwd": (native.native_variance_bwd, (torch.ones(3, device=device), x, mean, std, 1.0)),
        "retrieve_fwd": (native.native_retrieve_fwd, (query, keys, values, beta, 1.0, 1)),
        "retrieve_bwd": (
            native.native_retrieve_bwd,
            (torch.ones_like(read), torch.ones_like(lse), query, keys, values, beta, 1.0, 1, read, lse),
        ),
        "deviation_map": (native.native_deviation_map, (feature_map, keys, None, beta, 1.0, 2, 0, None)),
    }


OPERATORS = [
    "gather_fwd",
    "gather_bwd",
    "variance_fwd",
    "variance_bwd",
    "retrieve_fwd",
    "retrieve_bwd",
    "deviation_map",
]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_their_schemas_and_fakes(device: str, name: str) -> None:
    operator, arguments = operator_calls(device, torch.float32)[name]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operators_refuse_what_they_cannot_read(device: str) -> None:
    native = torch.ops.anomem
    x, feature_map, positions = draw(2, 3, 4).to(device), draw(1, 2, 2, 2).to(device), torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match="contiguous"):
        native.native_variance_fwd(x.transpose(1, 2), 1.0, 1e-4)
    with pytest.raises(RuntimeError, match=r"`positions`: expected torch\.int64, received torch\.float32"):
        native.native_gather_fwd(feature_map, positions, False)
    with pytest.raises(RuntimeError, match=r"`map`: expected float32, bfloat16 or float16, received torch\.float64"):
        native.native_gather_fwd(feature_map.double(), positions.long(), False)
    with pytest.raises(RuntimeError, match=r"`keys`: expected \[M, 4\], received shape \[3, 2\]"):
        native.native_retrieve_fwd(x[0], x[0, :, :2], None, None, 1.0, 1)
