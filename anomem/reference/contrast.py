"""The contrastive losses: NT-Xent (Chen et al. 2020, Eq. 1), its rectangular form, and the objectives of AnoMem.

The gradients that the fused kernels compute. Of NT-Xent, with u the unit rows, s_ij = u_i·u_j / tau, g_i the upstream
gradient of l_i, P_ij = exp(s_ij − lse_i) and P_ii = 0:

    ds_ij = g_i (P_ij − [j = i ± B])
    du_i  = (1/tau) Σ_j (ds_ij + ds_ji) u_j
          = (1/tau) [Σ_j (g_i P_ij + g_j P_ji) u_j − (g_i + g_{i±B}) u_{i±B}]
    dtau  = −(1/tau) Σ_ij ds_ij s_ij

s is symmetric: one tile of it gives both sums. Of the rectangular form, with rows u, columns v and P_ij = 0 where j is
excluded from row i:

    ds_ij = g_i (P_ij − [j = positive_i]),   du_i = (1/tau) Σ_j ds_ij v_j,   dv_j = (1/tau) Σ_i ds_ij u_i

At the positive P_ij − 1 = −(1 − exp(−l_i)), exact where P_ij is close to 1; −1 where the row excludes its positive.
The backward recomputes P from the saved lse: no [N, N] matrix is kept. Unit rows bound s by 1/tau, so a constant shift
replaces the running maximum wherever exp(−2/tau) does not underflow. The gradient goes through u = z/|z| as in
`anomem.reference.retrieve`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from anomem.reference.retrieve import Normalize, hopfield_retrieve, l2_normalize
from anomem.reference.sampling import variance_hinge

Negatives = Literal["image", "position", "both"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)
Weighting = Literal["linear", "exp"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


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
        exclude: [R] int64, a column each row must not see (itself), or None. A row that excludes its positive is
            contrasted with its negatives alone (decoupled contrastive learning, Yeh et al. 2022).
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
    matched = similarity.gather(-1, positive.expand(similarity.shape[:-1]).unsqueeze(-1)).squeeze(-1)  # [G, R]
    row, true = torch.arange(similarity.shape[-2], device=similarity.device), positive.new_ones((), dtype=torch.bool)
    hidden = torch.zeros(similarity.shape[-2:], dtype=torch.bool, device=similarity.device)
    hidden = hidden.index_put((row, positive), true)
    if exclude is not None:
        hidden = hidden.index_put((row, exclude), true)
    # log(Σ negatives / positive). Of log(1 + Σ / positive) the softplus keeps the digits where the positive dominates;
    # logsumexp minus positive, the difference of two nearly equal numbers, does not.
    ratio = torch.logsumexp(similarity.masked_fill(hidden, -torch.inf), dim=-1) - matched
    loss: Tensor = torch.nn.functional.softplus(ratio, threshold=40)
    return loss if exclude is None else torch.where(positive == exclude, ratio, loss)


def block_log_sums(block: Tensor, other: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """The part of NT-Xent's log-sums that two blocks of a batch have in common: of a batch whose rows are made block by
    block.

    lse_i = logsumexp_j(u_i·u_j / tau) over the rows j of the other block; in the block itself over its negatives, all
    rows but i and its positive.

    Args:
        block: [R, d], rows [z; z_pair] of some pairs.
        other: [C, d], those of other pairs; None for the block itself.
        temperature: tau > 0.

    Returns:
        [R] and [C] float64, of the rows of both blocks; of the block itself [R] and [0].
    """
    similarity = _block_similarity(block, other, temperature)
    sums = [torch.logsumexp(x, dim=-1).double() for x in (similarity, similarity.mT)]
    return sums[0], sums[1][:0] if other is None else sums[1]


def block_gradient(
    block: Tensor, other: Tensor | None, lse: Tensor, other_lse: Tensor | None, temperature: float
) -> Tensor:
    """What the negatives in one block give to the gradient of Σ l_i at another block's rows.

    du_i = (1/tau) Σ_j (exp(s_ij − lse_i) + exp(s_ij − lse_j)) u_j over the same j as in `block_log_sums`.

    Args:
        block: [R, d].
        other: [C, d], or None for the block itself.
        lse: [R] float64, log-sums of all that the rows see, positives included.
        other_lse: [C] float64, with `other` only.
        temperature: tau > 0.

    Returns:
        [R, d], the gradient of the rows before their normalisation.
    """
    similarity = _block_similarity(block, other, temperature).double()
    columns_lse = lse if other_lse is None else other_lse
    weights = (similarity - lse[:, None]).exp() + (similarity - columns_lse).exp()
    columns = l2_normalize(block if other is None else other)
    return through_l2(block, weights.to(block.dtype) @ columns / temperature)


def through_l2(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at x [R, d] of one at `l2_normalize(x)`."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(l2_normalize(leaf), leaf, gradient)
    return found


def _block_similarity(block: Tensor, other: Tensor | None, temperature: float) -> Tensor:
    """s [R, C]; −inf where the other block is the block itself and the column is no negative of the row."""
    unit = l2_normalize(block)
    similarity = unit @ (unit if other is None else l2_normalize(other)).mT / temperature
    if other is not None:
        return similarity
    pairs = torch.eye(len(block) // 2, dtype=torch.bool, device=block.device)
    return similarity.masked_fill(pairs.repeat(2, 2), -torch.inf)


def _opposite(batch: int, device: torch.device) -> Tensor:
    """[2B] int64: i + B for the first view, i − B for the second."""
    return torch.arange(2 * batch, device=device).roll(batch)


def contrasted_memory_loss(
    z: Tensor,
    z_pair: Tensor,
    prototypes: Tensor,
    *,
    is_normal: Tensor | None = None,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
    temperature: float | Tensor = 0.2,
    negatives: Negatives = "image",
    symmetric: bool = True,
    variance_gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """L_COM and L_V of one scale, means over the n sampled positions (the bracket of Eq. 4 before lambda_V).

    With p' = HF(z') for normal images and p' = z' for labelled anomalies, L_COM is NT-Xent between z and p'.
    The symmetric form is the mean of that and of the same with the views exchanged. The variance term acts on p
    (the mean over both views when symmetric).

    Args:
        z: [n, B, d], the sampled vectors of one view.
        z_pair: [n, B, d], the same positions of the other view.
        prototypes: [M, d].
        is_normal: [B] bool, y_k = 1; None when every image is normal.
        temperature: tau of the contrast.
        negatives: other images at the same position, other positions of the same image, or the sum of both.
        variance_gamma: target standard deviation of the variance term.

    Returns:
        (L_COM, L_V), both 0-dim.
    """

    def remembered(view: Tensor) -> Tensor:  # [n, B, d] -> [n, B, d]
        retrieved = hopfield_retrieve(view, prototypes, beta=beta, normalize=normalize).out
        return retrieved if is_normal is None else torch.where(is_normal[:, None], retrieved, view)

    def contrast(view: Tensor, retrieved: Tensor) -> Tensor:
        terms = []
        if negatives != "position":
            terms.append(nt_xent_rows(view, retrieved, temperature).mean())
        if negatives != "image":
            terms.append(nt_xent_rows(view.transpose(0, 1), retrieved.transpose(0, 1), temperature).mean())
        return torch.stack(terms).sum()

    retrieved_pair = remembered(z_pair)
    loss, variance = contrast(z, retrieved_pair), variance_hinge(retrieved_pair, variance_gamma).mean()
    if symmetric:
        retrieved = remembered(z)
        loss = (loss + contrast(z_pair, retrieved)) / 2
        variance = (variance + variance_hinge(retrieved, variance_gamma).mean()) / 2
    return loss, variance


def scale_weights(count: int, weighting: Weighting = "exp") -> tuple[float, ...]:
    """lambda_s for s = 1 … S, increasing: s/S ("linear") or 2^(s−S) ("exp", the paper's table 7 default).

    Args:
        count: S ≥ 1, number of scales.
        weighting: "linear" or "exp".
    """
    if weighting == "linear":
        return tuple(s / count for s in range(1, count + 1))
    return tuple(2.0 ** (s - count) for s in range(1, count + 1))


def margin_loss(length: Tensor, is_normal: Tensor, margin: float | Tensor = 2.0) -> Tensor:
    """The margin loss of stage 2 at one scale: y max(0, |g| − 1/M) + (1 − y) max(0, M − |g|), mean over the batch.

    Args:
        length: [B], |g_k|, length of each image's embedding.
        is_normal: [B] bool.
        margin: M ≥ 1, a number or a 0-dim tensor; normals end inside radius 1/M, anomalies outside M.

    Returns:
        0-dim.
    """
    inside = torch.relu(length - 1 / margin)
    outside = torch.relu(margin - length)
    return torch.where(is_normal, inside, outside).mean()
