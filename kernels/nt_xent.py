"""Grouped NT-Xent, forward and backward, without a [2B, 2B] matrix.

Per group U = [z; z_pair], u_i = row i of unit length, positives i and i ± B (SimCLR, Chen et al. 2020, Eq. 1):

    l_i = log Σ_{j≠i} exp(u_i·u_j / tau) − u_i·u_{i±B} / tau

Forward: one row pass (`contrast_rows`) reads both views where they lie and writes U, scaled; then `contrast_forward`
with U as rows and as columns. Backward: `contrast_backward` over the full square, since the atomics or the second sum
of a triangle would cost more than the products they save; memory is O(G · 2B · d).

The forward takes the full square too. A triangle would halve its products and exponentials, and would have to store a
partial sum per tile for the columns to stay deterministic; whether that pays has to be measured on a GPU first.
"""

import torch
from torch import Tensor

from anomem.kernels.contrast_backward import JOINED, gradient
from anomem.kernels.contrast_forward import losses
from anomem.kernels.contrast_rows import scaled_rows


def forward(z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row.

    Args:
        z: [G, B, d], features adjacent, any other strides.
        z_pair: [G, B, d], likewise.
        temperature: 0-dim float32, or None for the constant `tau`.
        tau: see `temperature`.

    Returns:
        rows [G, 2B] float32, lse [G, 2B] float32, scaled [G, 2B, d] (see `contrast_rows`), inverse [G, 2B] float32.
    """
    groups, batch, features = z.shape
    scaled = z.new_empty(groups, 2 * batch, features)
    inverse = z.new_empty(groups, 2 * batch, dtype=torch.float32)
    scaled_rows(z, scaled[:, :batch], inverse[:, :batch], z_pair, scaled[:, batch:], inverse[:, batch:])
    rows, lse = losses(scaled, scaled, inverse, inverse, None, None, temperature, tau)
    return rows, lse, scaled, inverse


def backward(
    drows: Tensor, scaled: Tensor, inverse: Tensor, lse: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the views and the temperature.

    Args:
        drows: [G, 2B] float32, contiguous.
        scaled: of the forward.
        inverse: of the forward.
        lse: of the forward.
        temperature: of the forward.
        tau: of the forward.

    Returns:
        dz [G, B, d], dz_pair [G, B, d], dtemperature 0-dim float32 (empty without a learned temperature).
    """
    groups, count, features = scaled.shape
    dz, dz_pair = (scaled.new_empty(groups, count // 2, features) for _ in range(2))
    learned = temperature is not None
    matrices = (scaled, scaled, inverse, inverse)
    moment = gradient(JOINED, *matrices, lse, drows, None, None, temperature, tau, dz, dz_pair, learned)
    dtemperature = moment * -0.5 / temperature if learned else lse.new_empty(0)
    return dz, dz_pair, dtemperature
