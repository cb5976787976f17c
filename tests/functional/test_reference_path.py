"""The functions on plain PyTorch: options, shapes, autocast, compilation, and equality with the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.testing import draw


def test_leading_axes_are_free() -> None:
    query, keys = draw(2, 3, 5, 8), draw(6, 8, seed=1)
    out, lse, entropy = AF.hopfield_retrieve(query, keys, return_lse=True, return_entropy=True, impl="reference")
    assert out.shape == (2, 3, 5, 8)
    assert lse.shape == entropy.shape == (2, 3, 5)
    rows = AF.hopfield_retrieve(query.reshape(-1, 8), keys, impl="reference")
    assert torch.equal(out.reshape(-1, 8), rows)


def test_no_query_at_all() -> None:
    out, lse = AF.hopfield_retrieve(torch.empty(0, 8), draw(6, 8), return_lse=True, impl="reference")
    assert out.shape == (0, 8)
    assert lse.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    query, keys = draw(7, 16, dtype=dtype), draw(5, 16, dtype=dtype, seed=1)
    out, lse = AF.hopfield_retrieve(query, keys, return_lse=True, impl="reference")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, R.hopfield_retrieve(query.float(), keys.float()).out.to(dtype))


def test_autocast_casts_inputs_and_keeps_losses_in_float32() -> None:
    z, pair = draw(2, 4, 8), draw(2, 4, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = AF.nt_xent(z, pair, impl="reference")
        out = AF.hopfield_retrieve(z, draw(3, 8), impl="reference")
    assert loss.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    expected = R.nt_xent_rows(z.bfloat16().float(), pair.bfloat16().float(), 0.2).mean()
    assert torch.equal(loss, expected)


def test_views_of_two_dtypes_meet_under_autocast() -> None:
    z, pair, keys = draw(2, 4, 8), draw(2, 4, 8, seed=1), draw(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = AF.contrasted_memory_loss(z, pair.bfloat16(), keys, impl="reference")
        same = AF.contrasted_memory_loss(z, pair, keys, impl="reference")
    assert [float(x) for x in mixed] == [float(x) for x in same]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: AF.contrast.Reduction) -> None:
    z, pair = draw(2, 4, 8), draw(2, 4, 8, seed=1)
    rows = R.nt_xent_rows(z, pair, 0.2)
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    assert torch.equal(AF.nt_xent(z, pair, reduction=reduction, impl="reference"), expected)
    one_group = AF.nt_xent(z[0], pair[0], reduction=reduction, impl="reference")
    assert one_group.shape == ((8,) if reduction == "none" else ())


def test_nt_xent_is_the_rectangular_form_row_by_row() -> None:
    z, pair = draw(3, 5, 8), draw(3, 5, 8, seed=1)
    both = torch.cat([z, pair], dim=1)
    every = torch.arange(10)
    rows = AF.info_nce(both, both, every.roll(5), every, temperature=0.2, reduction="none", impl="reference")
    torch.testing.assert_close(rows, AF.nt_xent(z, pair, reduction="none", impl="reference"))


def test_shapes_can_be_tried_out_on_the_meta_device() -> None:
    z, pair = (torch.empty(2, 4, 8, device="meta", requires_grad=True) for _ in range(2))
    loss = AF.nt_xent(z, AF.hopfield_retrieve(pair, torch.empty(3, 8, device="meta")))
    loss.backward()
    assert loss.is_meta
    assert z.grad is not None
    assert z.grad.shape == z.shape


def test_a_group_of_one_pair_has_no_loss_and_no_gradient() -> None:
    z, pair = (draw(2, 1, 8, seed=s).requires_grad_() for s in (0, 1))
    loss = AF.nt_xent(z, pair, impl="reference")
    loss.backward()
    assert not loss.detach().any()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6


def test_functions_compile_into_one_graph() -> None:
    def step(z: Tensor, pair: Tensor, keys: Tensor) -> Tensor:
        total, variance = AF.contrasted_memory_loss(z, pair, keys, negatives="both", impl="reference")
        return total + variance

    torch.compiler.reset()
    inputs = draw(2, 4, 8), draw(2, 4, 8, seed=1), draw(3, 8, seed=2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize("negatives", ["image", "position", "both"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outliers", [False, True])
def test_the_loss_of_a_scale_is_equation_4(negatives: R.Negatives, symmetric: bool, outliers: bool) -> None:
    z, pair, keys = draw(3, 4, 8), draw(3, 4, 8, seed=1), draw(5, 8, seed=2)
    is_normal = torch.tensor([True, False, True, True]) if outliers else None
    options = {"is_normal": is_normal, "negatives": negatives, "symmetric": symmetric}
    actual = AF.contrasted_memory_loss(z.double(), pair.double(), keys.double(), impl="reference", **options)  # type: ignore[arg-type]
    expected = R.contrasted_memory_loss(z.double(), pair.double(), keys.double(), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected)


def test_the_deviation_map_takes_the_energy_of_its_positions() -> None:
    feature_map, keys = draw(2, 8, 3, 3), draw(5, 8, seed=1)
    distances = AF.deviation_map(feature_map, keys, impl="reference")
    query = feature_map.flatten(2).mT
    retrieved = AF.hopfield_retrieve(query, keys, impl="reference")
    cosine = torch.cosine_similarity(R.layer_normalize(query), retrieved, dim=-1)
    torch.testing.assert_close(distances, (1 - cosine).reshape(2, 3, 3))
    last = AF.deviation_map(feature_map.to(memory_format=torch.channels_last), keys, impl="reference")
    torch.testing.assert_close(distances, last)
