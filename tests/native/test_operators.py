"""The native operators below the documented functions: what they refuse, since they would read outside, and return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anomem.functional import (
    ViewParameters,
    augment,
    batch_norm,
    conv3x3,
    deviation_map,
    downsample,
    gather_positions,
    hopfield_retrieve,
    memory_diagnostics,
    nt_xent,
)
from anomem.testing import draw

Call = tuple[Any, tuple[Any, ...], str]
OPERATORS = torch.ops.anomem


@pytest.fixture(autouse=True)
def registered(library: None) -> None:
    """A first call of each function loads the library and registers the operators."""
    query, prototypes, feature_map = draw(6, 4), draw(5, 4), draw(2, 4, 3, 3)
    hopfield_retrieve(query, prototypes, impl="native")
    nt_xent(query, query, impl="native")
    gather_positions(feature_map, torch.tensor([0]), impl="native")
    batch_norm(feature_map, training=True, impl="native")
    conv3x3(feature_map, draw(2, 4, 3, 3), impl="native")
    downsample(feature_map, draw(2, 4, 3, 3), draw(2, 4, 1, 1), impl="native")
    augment(feature_map[:, :3].sigmoid(), ViewParameters(), impl="native")
    deviation_map(feature_map, prototypes, impl="native")
    memory_diagnostics(query, prototypes, impl="native")


def refused_retrievals() -> Iterator[Call]:
    query, prototypes = draw(6, 4, seed=1), draw(5, 4, seed=2)
    operator, rest = OPERATORS.native_retrieve_fwd, (None, 0.5, 1)
    yield operator, (query, prototypes[:, :3].contiguous(), None, *rest), "keys"
    yield operator, (query, prototypes.double(), None, *rest), "keys"
    yield operator, (query, prototypes.T.contiguous().T, None, *rest), "keys"
    yield operator, (query, prototypes[:0], None, *rest), "M >= 1"
    yield operator, (query, prototypes, prototypes[:3].contiguous(), *rest), "values"
    yield operator, (query, prototypes, None, None, 0.5, 3), "normalize"


def refused_contrasts() -> Iterator[Call]:
    z, z_pair = (draw(2, 3, 4, seed=seed) for seed in (1, 2))
    forward, backward = OPERATORS.native_nt_xent_fwd, OPERATORS.native_nt_xent_bwd
    rows, total, inv_norm = forward(z, z_pair, None, 0.2)
    yield forward, (z, z_pair[:1], None, 0.2), "z_pair"
    yield forward, (z, z_pair.double(), None, 0.2), "z_pair"
    yield forward, (z.mT.contiguous().mT, z_pair, None, 0.2), "unit stride"
    yield backward, (rows, z, z_pair, rows, total[:, :5], inv_norm, None, 0.2), "total"
    yield backward, (rows, z, z_pair[:, :2], rows, total, inv_norm, None, 0.2), "z_pair"
    kept_backward = OPERATORS.native_nt_xent_kept_bwd
    *results, products = OPERATORS.native_nt_xent_kept_fwd(z, z_pair, None, 0.2, 1)
    most = "2, the tiles of all groups"
    yield OPERATORS.native_nt_xent_kept_fwd, (z, z_pair, None, 0.2, 3), f"expected 0 to {most}, received 3"
    yield kept_backward, (rows, z, z_pair, *results, products[:, 1:].contiguous(), None, 0.2), "products"
    yield kept_backward, (rows, z, z_pair, *results, products.repeat(3, 1), None, 0.2), f"expected at most {most}"
    positive = torch.tensor([0, 4])
    yield (
        OPERATORS.native_info_nce_fwd,
        (draw(1, 2, 3), draw(1, 4, 3), positive, None, None, 0.2),
        "expected indices from 0 to 3, received 4",
    )


def refused_blocks() -> Iterator[Call]:
    block, other = draw(6, 4), draw(5, 4, seed=1)
    forward, backward = OPERATORS.native_contrast_block_fwd, OPERATORS.native_contrast_block_bwd
    lse, other_lse = forward(block, other, 0.2)
    yield forward, (block[None], None, 0.2), "block"
    yield forward, (block[:5], None, 0.2), "expected an even number of rows"
    yield forward, (block[:, :0], None, 0.2), "block"
    yield forward, (block, other[:, :3], 0.2), "other"
    yield forward, (block, other.double(), 0.2), "other"
    yield forward, (block.T.contiguous().T, other, 0.2), "unit stride"
    yield backward, (block, other, lse.float(), other_lse, 0.2), "lse"
    yield backward, (block, other, lse[:5], other_lse, 0.2), "lse"
    yield backward, (block, other, lse, other_lse[:4], 0.2), "other_lse"
    yield backward, (block, other, lse, None, 0.2), "other_lse"
    yield backward, (block, None, lse, other_lse, 0.2), "other_lse"


def refused_samples() -> Iterator[Call]:
    feature_map, rows = draw(2, 5, 3, 4), draw(2, 6, 5)
    forward, backward = OPERATORS.native_gather_fwd, OPERATORS.native_gather_bwd
    vectors, inv_norm = forward(feature_map, torch.tensor([1, 2]), True)
    rest = ([2, 5, 3, 4], False, True)
    yield forward, (feature_map, torch.tensor([12]), False), "expected indices from 0 to 11, received 12"
    yield forward, (feature_map, torch.tensor([-1]), False), "expected indices from 0 to 11, received -1"
    yield forward, (feature_map, torch.tensor([1], dtype=torch.int32), False), "positions"
    yield forward, (feature_map, torch.zeros(3, 1, dtype=torch.int64), False), "positions"
    yield forward, (feature_map[0], torch.tensor([1]), False), "map"
    yield (
        backward,
        (vectors, vectors, inv_norm, torch.tensor([1, 12]), *rest),
        "expected indices from 0 to 11, received 12",
    )
    yield backward, (vectors, vectors[:1], inv_norm, torch.tensor([1, 2]), *rest), "`out`"
    yield OPERATORS.native_variance_fwd, (rows[:, :1].contiguous(), 1.0, 1e-4), "x"
    yield OPERATORS.native_variance_fwd, (rows.transpose(1, 2), 1.0, 1e-4), "contiguous"
    yield OPERATORS.native_variance_bwd, (torch.ones(2), rows, rows[:, 0, :4], rows[:, 0], 1.0), "`mean`"


def refused_maps_and_usages() -> Iterator[Call]:
    feature_map, query, prototypes = draw(2, 6, 3, 3), draw(7, 6), draw(4, 6, seed=1)
    narrow, rest = prototypes[:, :3].contiguous(), (None, 0.5, 1)
    operator, usage = OPERATORS.native_deviation_map, OPERATORS.native_usage
    yield operator, (feature_map[0], prototypes, None, *rest, 0, None), "map"
    yield operator, (feature_map, narrow, None, *rest, 0, None), "keys"
    yield operator, (feature_map, prototypes, narrow, *rest, 0, None), "v"
    yield operator, (feature_map, prototypes, None, *rest, 2, None), "distance"
    yield operator, (feature_map, prototypes, None, *rest, 0, draw(8, 4)), "log_prior"
    yield usage, (query[:, :3], prototypes, *rest), "keys"
    yield usage, (query[0], prototypes, *rest), "query"
    yield usage, (query.double(), prototypes, *rest), "keys"


def refused_augmentations() -> Iterator[Call]:
    operator, images, three = OPERATORS.native_augment, torch.zeros(2, 3, 5, 4), torch.zeros(3)
    none, rest = [None] * 7, (0, 0, False)
    yield operator, (images[0], *none, 2, *rest), "images"
    yield operator, (images.double(), *none, 2, *rest), "images"
    yield operator, (images[:, :0], *none, 2, *rest), "C >= 1"
    yield operator, (images.new_zeros(1, 1, 1, 20000), *none, 1, *rest), "at most 16384 pixels"
    yield operator, (images, *none, 3, *rest), "a multiple of 2"
    yield operator, (images, torch.zeros(2, 3, 2), *none[1:], 2, *rest), "matrices"
    yield operator, (images, None, three, *none[2:], 2, *rest), "brightness"
    yield operator, (images, None, torch.ones(2, dtype=torch.float64), *none[2:], 2, *rest), "brightness"
    yield operator, (images, *none[:5], torch.ones(2), None, 2, *rest), "keys"
    yield operator, (images, *none[:5], torch.ones(2), torch.ones(2), 2, *rest), "keys"
    yield operator, (images, *none, 2, 4, 0, False), "`radius`: expected 0 to 3"
    yield operator, (images, *none, 2, 0, 3, False), "padding"


def refused_batch_norms() -> Iterator[Call]:
    x, three, four = draw(2, 3, 5, 4).contiguous(memory_format=torch.channels_last), torch.ones(3), torch.ones(4)
    statistics, apply = OPERATORS.native_batch_norm_statistics, OPERATORS.native_batch_norm_apply
    sums, gradient = OPERATORS.native_batch_norm_sums, OPERATORS.native_batch_norm_gradient
    affine, rest = (three, three, None, None), (1e-5, True)
    yield statistics, (x.contiguous(),), "a channels-last map"
    yield statistics, (x[0],), "x"
    yield statistics, (x[:0],), "at least one row"
    yield statistics, (x.half(),), "float32, bfloat16 or float64"
    yield apply, (x, four, *affine[1:], None, *rest), "`mean`"
    yield apply, (x, three, three.double(), None, None, None, *rest), "`variance`"
    yield apply, (x, three, three, four, None, None, *rest), "`weight`"
    yield apply, (x, *affine, x[:1], *rest), "`add`"
    yield apply, (x, *affine, x.contiguous(), *rest), "a channels-last map"
    yield sums, (x.double(), x, None, *affine, *rest), "`dout`"
    yield sums, (x, x, x[:, :2], *affine, *rest), "`out`"
    yield gradient, (x, x, None, *affine, three, four, 40, *rest, False), "`along`"
    yield gradient, (x, x, None, *affine, four, three, 40, *rest, False), "`constant`"


def refused_downsamples() -> Iterator[Call]:
    x = draw(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    take, add = OPERATORS.native_downsample_take, OPERATORS.native_downsample_add
    sampled = take(x)
    yield take, (x.contiguous(),), "`x`: expected a channels-last map"
    yield take, (x[0],), "`x`"
    yield take, (x[:, :0],), "C >= 1"
    yield take, (x.half(),), "float32, bfloat16 or float64"
    yield add, (x.contiguous(), sampled), "`map`: expected a channels-last map"
    yield add, (x[:1].expand_as(x), sampled), "`map`: expected a channels-last map"
    yield add, (x, sampled.contiguous()), "`sampled`: expected a channels-last map"
    yield add, (x, sampled[:1]), "`sampled`"
    yield add, (x, sampled[:, :, :2]), "`sampled`"
    yield add, (x, x), "`sampled`"
    yield add, (x, sampled.double()), "`sampled`"


def refused_convolutions() -> Iterator[Call]:
    layout = torch.channels_last
    x, grad = draw(2, 3, 5, 4).contiguous(memory_format=layout), draw(2, 6, 5, 4).contiguous(memory_format=layout)
    weight = draw(6, 3, 3, 3).contiguous(memory_format=layout)
    convolve, of_weight = OPERATORS.native_conv3x3, OPERATORS.native_conv3x3_weight
    yield convolve, (x.contiguous(), weight, False), "`x`: expected a channels-last map"
    yield convolve, (x[0], weight, False), "`x`"
    yield convolve, (x.half(), weight, False), "float32, bfloat16 or float64"
    yield convolve, (x, weight.contiguous(), False), "`weight`: expected a channels-last map"
    yield convolve, (x, weight.double(), False), "`weight`"
    yield convolve, (x, weight, True), "`weight`"
    yield convolve, (grad, weight, False), "`weight`"
    yield convolve, (x, weight[:0], False), "K >= 1"
    yield convolve, (x, weight[:, :, :2], False), "`weight`"
    yield OPERATORS.native_conv3x3_direct, (x.half(),), "float32, bfloat16 or float64"
    yield of_weight, (x, grad.contiguous()), "`grad`: expected a channels-last map"
    yield of_weight, (x, grad[:1]), "`grad`"
    yield of_weight, (x, grad[:, :0]), "K >= 1"
    yield of_weight, (x, grad.double()), "`grad`"


@pytest.mark.parametrize(
    "calls",
    [
        refused_retrievals,
        refused_contrasts,
        refused_blocks,
        refused_samples,
        refused_maps_and_usages,
        refused_augmentations,
        refused_batch_norms,
        refused_downsamples,
        refused_convolutions,
    ],
    ids=lambda f: f.__name__,
)
def test_what_would_be_misread_is_refused(calls: Any) -> None:
    for operator, arguments, message in calls():
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_direction_is_the_mean_unit_retrieval() -> None:
    query, prototypes = draw(300, 8).double(), draw(9, 8, seed=1).double()
    direction = OPERATORS.native_usage(query, prototypes, None, 0.5, 1)[3]
    retrieved = hopfield_retrieve(query, prototypes, beta=0.5, impl="reference")
    torch.testing.assert_close(direction, torch.nn.functional.normalize(retrieved, dim=1).mean(dim=0))
