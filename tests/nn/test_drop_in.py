"""The layers stand where people now use hflayers, lightly and pytorch-metric-learning: same numbers, same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem import nn as ann
from anomem.testing import draw


def lightly_formula(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss without memory bank, from its definition: cross-entropy over 2B − 1 logits, self removed."""
    batch = z0.shape[0]
    unit = torch.cat([torch.nn.functional.normalize(z, dim=1) for z in (z0, z1)])
    logits = unit @ unit.T / temperature
    others = ~torch.eye(2 * batch, dtype=torch.bool)
    logits = logits[others].view(2 * batch, -1)
    labels = torch.cat([torch.arange(batch) + batch - 1, torch.arange(batch)])
    return torch.nn.functional.cross_entropy(logits, labels)


def metric_learning_formula(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="the extra `peers` is not installed")
    labels = torch.arange(z0.shape[0]).repeat(2)
    loss: Tensor = losses.NTXentLoss(temperature=temperature)(torch.cat([z0, z1]), labels)
    return loss


@pytest.mark.parametrize("peer", [lightly_formula, metric_learning_formula])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_loss_equals_its_peers(peer: Callable[[Tensor, Tensor, float], Tensor], temperature: float) -> None:
    views = [draw(6, 16, seed=s).double() for s in (0, 1)]
    ours = [v.clone().requires_grad_() for v in views]
    peers = [v.clone().requires_grad_() for v in views]
    loss = ann.NTXentLoss(temperature)(*ours)
    expected = peer(*peers, temperature)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, peers), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_info_nce_loss_equals_cross_entropy() -> None:
    images, texts = (torch.nn.functional.normalize(draw(5, 8, seed=s).double(), dim=1) for s in (0, 1))
    expected = torch.nn.functional.cross_entropy(images @ texts.T / 0.07, torch.arange(5))
    torch.testing.assert_close(ann.InfoNCELoss(0.07)(images, texts), expected)


def test_hopfield_memory_equals_static_single_head_association() -> None:
    """hflayers' static mode without projections: state and stored pattern LayerNormed, softmax(beta q Kᵀ) V."""
    memory = ann.HopfieldMemory(16, 6).double()
    query = draw(3, 4, 16).double()
    norm = torch.nn.LayerNorm(16, elementwise_affine=False).double()
    patterns = norm(memory.prototypes)
    expected = torch.softmax(norm(query) @ patterns.T / 4, dim=-1) @ patterns
    torch.testing.assert_close(memory(query), expected)


def test_learned_parameters_receive_gradients() -> None:
    memory = ann.HopfieldMemory(8, 4, learn_beta=True, value_features=3, steps=2)
    criterion = ann.NTXentLoss(learn_temperature=True)
    out = memory(draw(5, 8))
    assert out.shape == (5, 3)
    criterion(out, draw(5, 3, seed=1)).backward()
    for name, parameter in [*memory.named_parameters(), *criterion.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_reset_draws_anew_and_sets_beta_back() -> None:
    memory = ann.HopfieldMemory(8, 4, beta=2.0, learn_beta=True)
    before = memory.prototypes.detach().clone()
    with torch.no_grad():
        memory.beta.fill_(7.0)  # type: ignore[union-attr]
    memory.reset_parameters()
    assert memory.beta.detach() == 2.0  # type: ignore[union-attr]
    assert not torch.equal(memory.prototypes, before)


def test_a_model_made_on_the_meta_device_is_reset_where_it_lands() -> None:
    with torch.device("meta"):
        layers = torch.nn.ModuleList(
            [ann.HopfieldMemory(8, 4, beta=2.0, learn_beta=True), ann.NTXentLoss(0.3, learn_temperature=True)]
        )
    layers.to_empty(device="cpu")
    for module in layers.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    memory, criterion = layers
    assert memory.beta.detach() == 2.0
    assert memory.prototypes.isfinite().all()
    torch.testing.assert_close(
        criterion(draw(3, 8), draw(3, 8, seed=1)), ann.NTXentLoss(0.3)(draw(3, 8), draw(3, 8, seed=1))
    )


def test_fill_takes_distinct_rows_and_repeats_when_there_are_too_few() -> None:
    features = torch.arange(6.0)[:, None].expand(6, 3)
    memory = ann.HopfieldMemory(3, 6)
    memory.fill(features)
    assert memory.prototypes[:, 0].sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    memory.fill(features[:2])
    assert memory.prototypes[:, 0].sort().values.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_memory_that_was_filled_reads_alike_with_separate_values() -> None:
    features, query = draw(20, 8), draw(5, 8)
    for normalize in ("none", "l2", "layer"):
        tied = ann.HopfieldMemory(8, 6, normalize=normalize)
        separate = ann.HopfieldMemory(8, 6, normalize=normalize, value_features=8)
        for memory in (tied, separate):
            memory.fill(features, torch.Generator().manual_seed(0))
        torch.testing.assert_close(separate(query), tied(query))


def test_a_memory_is_saved_loaded_and_copied() -> None:
    memory = ann.HopfieldMemory(8, 4, learn_beta=True)
    other = ann.HopfieldMemory(8, 4, learn_beta=True)
    other.load_state_dict(memory.state_dict())
    query = draw(2, 8)
    assert torch.equal(other(query), memory(query))
    assert torch.equal(copy.deepcopy(memory)(query), memory(query))


def test_diagnostics_tell_soft_averaging_from_a_memory_in_use() -> None:
    query = draw(400, 16)
    averaging = ann.HopfieldMemory(16, 8, beta=1e-3).diagnostics(query)
    sharp = ann.HopfieldMemory(16, 8, beta=50.0).diagnostics(query)
    assert averaging.perplexity > 7.9
    assert averaging.mean_length > 0.99
    assert sharp.perplexity < 1.2
    assert sharp.effective > 4
    assert int(sharp.usage.sum()) == 400


def test_the_scale_loss_weighs_its_two_terms() -> None:
    memory = ann.HopfieldMemory(8, 4)
    total, contrast, variance = ann.ContrastedMemoryLoss(variance_weight=0.3)(
        draw(2, 5, 8), draw(2, 5, 8, seed=1), memory
    )
    torch.testing.assert_close(total, contrast + 0.3 * variance)
