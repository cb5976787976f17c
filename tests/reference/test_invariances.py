"""What must not change, or change in a known way, when the input is moved about."""

from __future__ import annotations

import torch

from anomem import reference as R


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_retrieval_is_permutation_invariant_in_the_prototypes() -> None:
    query, prototypes, order = random(3, 8), random(6, 8, seed=1), torch.randperm(6)
    before, after = R.hopfield_retrieve(query, prototypes), R.hopfield_retrieve(query, prototypes[order])
    torch.testing.assert_close(before.out, after.out)
    torch.testing.assert_close(before.weights[:, order], after.weights)


def test_retrieval_of_a_query_does_not_depend_on_the_others() -> None:
    query, prototypes = random(5, 8), random(6, 8, seed=1)
    alone = R.hopfield_retrieve(query[2], prototypes).out
    torch.testing.assert_close(R.hopfield_retrieve(query, prototypes).out[2], alone)


def test_layer_normalised_retrieval_ignores_scale_and_offset() -> None:
    query, prototypes = random(3, 8), random(6, 8, seed=1)
    moved = R.hopfield_retrieve(7 * query + 3, 2 * prototypes - 1).out
    torch.testing.assert_close(R.hopfield_retrieve(query, prototypes).out, moved, atol=1e-4, rtol=1e-4)


def test_large_beta_gives_the_nearest_prototype() -> None:
    query, prototypes = R.l2_normalize(random(9, 8)), R.l2_normalize(random(6, 8, seed=1))
    nearest = prototypes[torch.cdist(query, prototypes).argmin(1)]
    torch.testing.assert_close(R.hopfield_retrieve(query, prototypes, beta=1e4, normalize="none").out, nearest)


def test_retrieval_stays_in_the_hull_of_its_values() -> None:
    query, prototypes = random(9, 8), random(6, 8, seed=1)
    out = R.hopfield_retrieve(query, prototypes, normalize="none").out
    assert (out <= prototypes.max(0).values).all()
    assert (out >= prototypes.min(0).values).all()


def test_a_stored_pattern_is_a_fixed_point_when_beta_is_large() -> None:
    prototypes = random(6, 32, seed=1)
    retrieved = R.hopfield_retrieve(prototypes, prototypes, beta=10.0, steps=3, normalize="none").out
    torch.testing.assert_close(retrieved, prototypes)


def test_nt_xent_ignores_length_rotation_and_order() -> None:
    z, z_pair, order = random(2, 5, 8), random(2, 5, 8, seed=1), torch.randperm(5)
    rotation = torch.linalg.qr(random(8, 8, seed=2))[0]
    rows = R.nt_xent_rows(z, z_pair, 0.2)
    torch.testing.assert_close(R.nt_xent_rows(3 * z, z_pair / 7, 0.2), rows)
    torch.testing.assert_close(R.nt_xent_rows(z @ rotation, z_pair @ rotation, 0.2), rows)
    permuted = R.nt_xent_rows(z[:, order], z_pair[:, order], 0.2)
    torch.testing.assert_close(permuted, torch.cat([rows[:, :5][:, order], rows[:, 5:][:, order]], dim=1))


def test_nt_xent_groups_are_independent() -> None:
    z, z_pair = random(3, 5, 8), random(3, 5, 8, seed=1)
    alone = R.nt_xent_rows(z[1:2], z_pair[1:2], 0.2)
    torch.testing.assert_close(R.nt_xent_rows(z, z_pair, 0.2)[1:2], alone)


def test_exchanging_the_views_exchanges_the_rows() -> None:
    z, z_pair = random(2, 5, 8), random(2, 5, 8, seed=1)
    there, back = R.nt_xent_rows(z, z_pair, 0.2), R.nt_xent_rows(z_pair, z, 0.2)
    torch.testing.assert_close(there.roll(5, dims=1), back)


def test_symmetric_scale_loss_is_symmetric_and_negatives_add_up() -> None:
    z, z_pair, prototypes = random(3, 4, 8), random(3, 4, 8, seed=1), random(6, 8, seed=2)
    there, back = (R.contrasted_memory_loss(a, b, prototypes) for a, b in ((z, z_pair), (z_pair, z)))
    torch.testing.assert_close(there, back)
    image, position, both = (
        R.contrasted_memory_loss(z, z_pair, prototypes, negatives=kind)[0] for kind in ("image", "position", "both")
    )
    torch.testing.assert_close(image + position, both)


def test_variance_hinge_ignores_offsets_and_order() -> None:
    x, order = 0.3 * random(2, 5, 8), torch.randperm(5)
    torch.testing.assert_close(R.variance_hinge(x[:, order] + 4), R.variance_hinge(x))
