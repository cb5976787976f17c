"""The contrastive losses: NT-Xent (Chen et al. 2020, Eq. 1), its rectangular form, and L_COM of AnoMem."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.reference.normalize import l2_normalize


def nt_xent_rows(z: Tensor, z_pair: Tensor, temperature: float | Tensor) -> Tensor:
    """NT-Xent, one loss for each of the 2B rows of U = [z; z_pair], rows L2-normalised.

    l_i = logsumexp_{j ≠ i}(u_i·u_j / tau) − u_i·u_{i ± B} / tau.

    Args:
        z: [G, B, d], one view; row k of `z` and row k of `z_pair` are positives, all other rows negatives.
        z_pair: [G, B, d], the other view.
        temperature: tau > 0, a number or a 0-dim tensor.

    Returns:
        [G, 2B]: the B losses of `z`'s rows, then those of `z_pair`'s.
    """
    batch = z.shape[-2]
    unit = l2_normalize(torch.cat([z, z_pair], dim=-2))  # [G, 2B, d]
    return contrast_rows(unit, unit, _opposite(batch, z.device), torch.arange(2 * batch, device=z.device), temperature)


def info_nce_rows(
    rows: Tensor, columns: Tensor, positive: Tensor, exclude: Tensor | None, temperature: float | Tensor
) -> Tensor:
    """The rectangular form: every row against every column but one, for distributed, CLIP- and MoCo-type use.

    l_i = logsumexp_{j ≠ exclude_i}(u_i·v_j / tau) − u_i·v_{positive_i} / tau, rows and columns L2-normalised.

    Args:
        rows: [G, R, d].
        columns: [G, C, d].
        positive: [R] int64, the column that matches each row, the same in every group.
        exclude: [R] int64, a column each row must not see (itself), or None.
        temperature: tau > 0.

    Returns:
        [G, R].
    """
    return contrast_rows(l2_normalize(rows), l2_normalize(columns), positive, exclude, temperature)


def contrast_rows(
    unit_rows: Tensor, unit_columns: Tensor, positive: Tensor, exclude: Tensor | None, temperature: float | Tensor
) -> Tensor:
    """Cross-entropy of the similarities of rows that are normalised already; shapes as in `info_nce_rows`."""
    similarity = unit_rows @ unit_columns.mT / temperature  # [G, R, C]
    if exclude is not None:
        row = torch.arange(similarity.shape[-2], device=similarity.device)
        hidden = torch.zeros(similarity.shape[-2:], dtype=torch.bool, device=similarity.device)
        hidden = hidden.index_put((row, exclude), torch.ones((), dtype=torch.bool, device=similarity.device))
        similarity = similarity.masked_fill(hidden, -torch.inf)
    index = positive.expand(similarity.shape[:-1]).unsqueeze(-1)  # [G, R, 1]
    return torch.logsumexp(similarity, dim=-1) - similarity.gather(-1, index).squeeze(-1)


def _opposite(batch: int, device: torch.device) -> Tensor:
    """[2B] int64: i + B for the first view, i − B for the second."""
    return torch.arange(2 * batch, device=device).roll(batch)
