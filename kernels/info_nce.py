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
from anomem.kernels.contrast_rows import scaled_rows


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
        loss [G, R] float32, lse [G, R] float32, scaled rows [G, R, d] and columns [G, C, d] (see `contrast_rows`), and
        their 1/|row| [G, R] and [G, C] float32.
    """
    x, y = rows.new_empty(rows.shape), columns.new_empty(columns.shape)
    inverse_x, inverse_y = (raw.new_empty(raw.shape[:2], dtype=torch.float32) for raw in (rows, columns))
    scaled_rows(rows, x, inverse_x, columns, y, inverse_y)
    loss, lse = losses(x, y, inverse_x, inverse_y, positive.contiguous(), _contiguous(exclude), temperature, tau)
    return loss, lse, x, y, inverse_x, inverse_y


def backward(
    dloss: Tensor,
    x: Tensor,
    y: Tensor,
    inverse_x: Tensor,
    inverse_y: Tensor,
    lse: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the columns and the temperature.

    Args:
        dloss: [G, R] float32, contiguous.
        x: scaled rows, of the forward.
        y: scaled columns, of the forward.
        inverse_x: 1/|row|, of the forward.
        inverse_y: 1/|column|, of the forward.
        lse: of the forward.
        positive: of the forward.
        exclude: of the forward.
        temperature: of the forward.
        tau: of the forward.

    Returns:
        drows [G, R, d], dcolumns [G, C, d], dtemperature 0-dim float32 (empty without a learned temperature).
    """
    drows, dcolumns = torch.empty_like(x), torch.empty_like(y)
    given = (lse, dloss, positive.contiguous(), _contiguous(exclude), temperature, tau)
    learned = temperature is not None
    moment = gradient(ROWS, x, y, inverse_x, inverse_y, *given, drows, None, learned)
    gradient(COLUMNS, y, x, inverse_y, inverse_x, *given, dcolumns, None, False)
    dtemperature = -moment / temperature if learned else lse.new_empty(0)
    return drows, dcolumns, dtemperature


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
