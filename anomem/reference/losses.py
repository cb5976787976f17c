"""The training objectives of both stages: Eq. (4) for one scale, the scale weights, and the margin loss of stage 2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anomem.reference.contrast import nt_xent_rows
from anomem.reference.normalize import Normalize
from anomem.reference.retrieval import hopfield_retrieve
from anomem.reference.variance import variance_hinge

Negatives = Literal["image", "position", "both"]
Weighting = Literal["linear", "exp"]


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
        read = hopfield_retrieve(view, prototypes, beta=beta, normalize=normalize).out
        return read if is_normal is None else torch.where(is_normal[:, None], read, view)

    def contrast(view: Tensor, read: Tensor) -> Tensor:
        terms = []
        if negatives != "position":
            terms.append(nt_xent_rows(view, read, temperature).mean())
        if negatives != "image":
            terms.append(nt_xent_rows(view.transpose(0, 1), read.transpose(0, 1), temperature).mean())
        return torch.stack(terms).sum()

    read_pair = remembered(z_pair)
    loss, variance = contrast(z, read_pair), variance_hinge(read_pair, variance_gamma).mean()
    if symmetric:
        read = remembered(z)
        loss = (loss + contrast(z_pair, read)) / 2
        variance = (variance + variance_hinge(read, variance_gamma).mean()) / 2
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


def margin_loss(length: Tensor, is_normal: Tensor, margin: float = 2.0) -> Tensor:
    """The margin loss of stage 2 at one scale: y max(0, |g| − 1/M) + (1 − y) max(0, M − |g|), mean over the batch.

    Args:
        length: [B], |g_k|, length of each image's embedding.
        is_normal: [B] bool.
        margin: M > 1; normals end inside radius 1/M, anomalies outside M.

    Returns:
        0-dim.
    """
    inside = torch.relu(length - 1 / margin)
    outside = torch.relu(margin - length)
    return torch.where(is_normal, inside, outside).mean()
