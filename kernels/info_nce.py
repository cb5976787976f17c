"""InfoNCE: each row finds its column among all columns but one, forward and backward, without a [R, C] matrix.

    l_i = log Σ_{j ≠ exclude_i} exp(u_i·v_j / tau) − u_i·v_{positive_i} / tau     (van den Oord et al. 2018, Eq. 4)

u, v: rows and columns at unit length. Backward: one pass whose blocks own rows and stream columns, one that is turned
round; each sum has a fixed order. On a GPU an index is not looked at before the launch: a row whose `positive` or
`exclude` is out of range has loss NaN.
"""

import torch
from torch import Tensor

from anomem.kernels.contrast_backward import COLUMNS, ROWS, gradient
from anomem.kernels.contrast_forward import losses
from anomem.kernels.contrast_rows import unit_rows


def forward(
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
        loss [G, R] float32, lse [G, R] float32, unit_rows [G, R, d], unit_columns [G, C, d],
        inv_norm_rows [G, R] float32, inv_norm_columns [G, C] float32.
    """
    u, v = rows.new_empty(rows.shape), columns.new_empty(columns.shape)
    inverse_u, inverse_v = (x.new_empty(x.shape[:2], dtype=torch.float32) for x in (rows, columns))
    unit_rows(rows, u, inverse_u, columns, v, inverse_v)
    loss, lse = losses(u, v, positive.contiguous(), _contiguous(exclude), temperature, tau)
    return loss, lse, u, v, inverse_u, inverse_v


def backward(
    dloss: Tensor,
    unit_rows: Tensor,
    unit_columns: Tensor,
    inv_norm_rows: Tensor,
    inv_norm_columns: Tensor,
    lse: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the columns and the temperature.

    Args:
        dloss: [G, R] float32, contiguous.
        unit_rows: of the forward.
        unit_columns: of the forward.
        inv_norm_rows: of the forward.
        inv_norm_columns: of the forward.
        lse: of the forward.
        positive: of the forward.
        exclude: of the forward.
        temperature: of the forward.
        tau: of the forward.

    Returns:
        drows [G, R, d], dcolumns [G, C, d], dtemperature 0-dim float32 (empty without a learned temperature).
    """
    drows, dcolumns = torch.empty_like(unit_rows), torch.empty_like(unit_columns)
    given = (lse, dloss, positive.contiguous(), _contiguous(exclude), temperature, tau)
    learned = temperature is not None
    moment = gradient(ROWS, unit_rows, unit_columns, inv_norm_rows, *given, drows, None, learned)
    gradient(COLUMNS, unit_columns, unit_rows, inv_norm_columns, *given, dcolumns, None, False)
    dtemperature = -moment / temperature.square() if learned else lse.new_empty(0)
    return drows, dcolumns, dtemperature


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
