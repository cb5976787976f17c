"""NT-Xent and InfoNCE, forward and backward, without a matrix of logits.

NT-Xent, per group: U = [z; z_pair], u_i = row i at unit length, positives i and i ± B (SimCLR, Chen et al. 2020, Eq. 1)

    l_i = log Σ_{j≠i} exp(u_i·u_j / tau) − u_i·u_{i±B} / tau

    The forward and the backward take the full square [2B, 2B], with U as rows and as columns; memory is O(G · 2B · d).
    A triangle would halve the products and exponentials of the forward, but would have to store a partial sum per tile
    for the columns to stay deterministic; not measured on a GPU yet. In the backward atomics or a second sum would cost
    more than the products that a triangle saves.

InfoNCE: each row finds its column among all columns but one (van den Oord et al. 2018, Eq. 4)

    l_i = log Σ_{j ≠ exclude_i} exp(u_i·v_j / tau) − u_i·v_{positive_i} / tau,   u, v: rows and columns at unit length

    The backward is two passes: blocks own rows and stream columns, then own columns and stream rows. On a GPU indices
    are not checked before the launch: a row whose `positive` or `exclude` is out of range has loss NaN.

Both forwards first scale the rows (`contrast_rows`), then run `contrast_forward`; both backwards run
`contrast_backward`, or for long rows and exact float32 `contrast_chunked`, in one pass. Every sum has a fixed order.
"""

import torch
from torch import Tensor

from anomem.kernels import contrast_chunked
from anomem.kernels.contrast_backward import COLUMNS, JOINED, ROWS, gradient
from anomem.kernels.contrast_forward import losses
from anomem.kernels.contrast_rows import Inputs, plan, scaled_rows, whole_vectors


def nt_xent_forward(
    z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row.

    Args:
        z: [G, B, d], features adjacent, any other strides.
        z_pair: [G, B, d], likewise.
        temperature: 0-dim float32, or None for the constant `tau`.
        tau: see `temperature`.

    Returns:
        rows [G, 2B] float32, lse [G, 2B] float32, scaled [G, 2B, D] (see `contrast_rows`), inverse [G, 2B] float32.
    """
    groups, batch, features = z.shape
    scaled = z.new_empty(groups, 2 * batch, whole_vectors(features, z.dtype))
    inverse = z.new_empty(groups, 2 * batch, dtype=torch.float32)
    scaled_rows(z, scaled[:, :batch], inverse[:, :batch], z_pair, scaled[:, batch:], inverse[:, batch:])
    rows, lse = losses(scaled, scaled, inverse, inverse, None, None, temperature, tau)
    return rows, lse, scaled, inverse


def nt_xent_backward(
    drows: Tensor,
    rows: Tensor,
    lse: Tensor,
    scaled: Tensor,
    inverse: Tensor,
    temperature: Tensor | None,
    tau: float,
    features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the views and the temperature.

    Args:
        drows: [G, 2B] float32, contiguous.
        rows, lse, scaled, inverse: results of the forward.
        temperature, tau: as in the forward.
        features: d.

    Returns:
        dz [G, B, d], dz_pair [G, B, d], dtemperature 0-dim float32 (empty without a learned temperature).
    """
    groups, count, _ = scaled.shape
    dz, dz_pair = (scaled.new_empty(groups, count // 2, features) for _ in range(2))
    learned = temperature is not None
    inputs = Inputs(scaled, inverse, (dz, dz_pair))
    arguments = (rows, lse, drows, None, None, temperature, tau, learned)
    cut = plan("contrast_backward", scaled)
    if cut is None or cut.sliced:
        moment = contrast_chunked.gradients(inputs, None, *arguments)
    else:
        moment = gradient(JOINED, inputs, inputs, *arguments, cut)
    dtemperature = moment * -0.5 / temperature if learned else lse.new_empty(0)
    return dz, dz_pair, dtemperature


def info_nce_forward(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row.

    Args:
        rows: [G, R, d], features adjacent.
        columns: [G, C, d], features adjacent.
        positive: [R] int64.
        exclude: [R] int64, or None.
        temperature: 0-dim float32, or None for the constant `tau`.
        tau: see `temperature`.

    Returns:
        loss [G, R] float32, lse [G, R] float32, scaled rows [G, R, D] and columns [G, C, D] (see `contrast_rows`), and
        their 1/|row| [G, R] and [G, C] float32.
    """
    width = whole_vectors(rows.shape[2], rows.dtype)
    x, y = (raw.new_empty(*raw.shape[:2], width) for raw in (rows, columns))
    inverse_x, inverse_y = (raw.new_empty(raw.shape[:2], dtype=torch.float32) for raw in (rows, columns))
    scaled_rows(rows, x, inverse_x, columns, y, inverse_y)
    loss, lse = losses(x, y, inverse_x, inverse_y, positive.contiguous(), _contiguous(exclude), temperature, tau)
    return loss, lse, x, y, inverse_x, inverse_y


def info_nce_backward(
    dloss: Tensor,
    loss: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor,
    inverse_x: Tensor,
    inverse_y: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the columns and the temperature.

    Args:
        dloss: [G, R] float32, contiguous.
        loss, lse, x, y, inverse_x, inverse_y: results of the forward.
        positive, exclude, temperature, tau: as in the forward.
        features: d.

    Returns:
        drows [G, R, d], dcolumns [G, C, d], dtemperature 0-dim float32 (empty without a learned temperature).
    """
    drows, dcolumns = (scaled.new_empty(*scaled.shape[:2], features) for scaled in (x, y))
    arguments = (loss, lse, dloss, positive.contiguous(), _contiguous(exclude), temperature, tau)
    learned = temperature is not None
    rows, columns = Inputs(x, inverse_x, (drows,)), Inputs(y, inverse_y, (dcolumns,))
    cut = plan("contrast_backward", x)
    if cut is None or cut.sliced:
        moment = contrast_chunked.gradients(rows, columns, *arguments, learned)
    else:
        moment = gradient(ROWS, rows, columns, *arguments, learned, cut)
        gradient(COLUMNS, columns, rows, *arguments, False, cut)
    dtemperature = -moment / temperature if learned else lse.new_empty(0)
    return drows, dcolumns, dtemperature


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
