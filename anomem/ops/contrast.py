"""NT-Xent and its rectangular form, one loss per row, with gradients to the un-normalised rows and the temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem.ops import batching, composite
from anomem.ops.library import accumulator, define, empty, implement_with_triton

# `unit` and `inv_norm` are what the same backend's backward reads: unit rows and 1/|row|. In Triton unit rows up
# to a factor between 1 and 2, which it finds in 1/|row| (see `anomem.kernels.contrast_rows`).
_NT_XENT_FORWARD = (
    "(Tensor z, Tensor z_pair, Tensor? temperature, float tau) -> "
    "(Tensor rows, Tensor lse, Tensor unit, Tensor inv_norm)"
)
_NT_XENT_BACKWARD = (
    "(Tensor drows, Tensor unit, Tensor inv_norm, Tensor lse, Tensor? temperature, float tau) -> "
    "(Tensor dz, Tensor dz_pair, Tensor dtemperature)"
)
_INFO_NCE_FORWARD = (
    "(Tensor rows, Tensor columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor loss, Tensor lse, Tensor unit_rows, Tensor unit_columns, Tensor inv_norm_rows, Tensor inv_norm_columns)"
)
_INFO_NCE_BACKWARD = (
    "(Tensor dloss, Tensor unit_rows, Tensor unit_columns, Tensor inv_norm_rows, Tensor inv_norm_columns, Tensor lse, "
    "Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor drows, Tensor dcolumns, Tensor dtemperature)"
)


def _nt_xent_forward_fake(
    z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, batch, features = z.shape
    dtype = accumulator(z)
    rows = (groups, 2 * batch)
    return (
        empty(z, *rows, dtype=dtype),
        empty(z, *rows, dtype=dtype),
        empty(z, *rows, features),
        empty(z, *rows, dtype=dtype),
    )


def _nt_xent_backward_fake(
    drows: Tensor, unit: Tensor, inv_norm: Tensor, lse: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, features = unit.shape
    dtemperature = empty(lse, 0) if temperature is None else empty(lse)
    return empty(unit, groups, rows // 2, features), empty(unit, groups, rows // 2, features), dtemperature


def _info_nce_forward_fake(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(rows)
    per_row, per_column = rows.shape[:2], columns.shape[:2]
    return (
        empty(rows, *per_row, dtype=dtype),
        empty(rows, *per_row, dtype=dtype),
        empty(rows, *rows.shape),
        empty(columns, *columns.shape),
        empty(rows, *per_row, dtype=dtype),
        empty(rows, *per_column, dtype=dtype),
    )


def _info_nce_backward_fake(
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
    dtemperature = empty(lse, 0) if temperature is None else empty(lse)
    return empty(unit_rows, *unit_rows.shape), empty(unit_columns, *unit_columns.shape), dtemperature


for _backend in ("native", "triton"):
    define(f"{_backend}_nt_xent_fwd", _NT_XENT_FORWARD, _nt_xent_forward_fake)
    define(f"{_backend}_nt_xent_bwd", _NT_XENT_BACKWARD, _nt_xent_backward_fake)
    define(f"{_backend}_info_nce_fwd", _INFO_NCE_FORWARD, _info_nce_forward_fake)
    define(f"{_backend}_info_nce_bwd", _INFO_NCE_BACKWARD, _info_nce_backward_fake)
for _operator in ("nt_xent", "info_nce"):
    implement_with_triton(f"triton_{_operator}_fwd", _operator, "forward")
    implement_with_triton(f"triton_{_operator}_bwd", _operator, "backward")


def nt_xent(z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float, backend: str) -> Tensor:
    """Loss of each row, by one backend.

    Args:
        z: [G, B, d], unit inner stride.
        z_pair: [G, B, d], unit inner stride.
        temperature: 0-dim, learned, in the accumulation dtype; or None for the constant `tau`.
        tau: the temperature when it is a constant.
        backend: "native" or "triton".

    Returns:
        [G, 2B] in the accumulation dtype.
    """
    rows: Tensor = _NTXent.apply(z, z_pair, temperature, tau, backend)[0]
    return rows


def info_nce(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    backend: str,
) -> Tensor:
    """Loss of each row against all columns but the excluded one, by one backend.

    Args:
        rows: [G, R, d], contiguous.
        columns: [G, C, d], contiguous.
        positive: [R] int64.
        exclude: [R] int64 or None.
        temperature: as in `nt_xent`.
        tau: as in `nt_xent`.
        backend: "native" or "triton".

    Returns:
        [G, R] in the accumulation dtype.
    """
    loss: Tensor = _InfoNCE.apply(rows, columns, positive, exclude, temperature, tau, backend)[0]
    return loss


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operators = torch.ops.anomem
        run = operators.native_nt_xent_fwd if backend == "native" else operators.triton_nt_xent_fwd
        rows, lse, unit, inv_norm = run(z, z_pair, temperature, tau)
        return rows, lse, unit, inv_norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, z_pair, temperature, ctx.tau, ctx.backend = inputs
        _, lse, unit, inv_norm = output
        ctx.mark_non_differentiable(lse, unit, inv_norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, z_pair, temperature, lse, unit, inv_norm)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if drows is None:
            return (None,) * 5
        z, z_pair, temperature, lse, unit, inv_norm = ctx.saved_tensors
        if composite.wants_graph():
            grads = composite.differentiable_gradients(
                _nt_xent_composite(ctx.tau), (z, z_pair, temperature), ctx.needs_input_grad[:3], (drows,)
            )
            return (*grads, None, None)
        operators = torch.ops.anomem
        run = operators.native_nt_xent_bwd if ctx.backend == "native" else operators.triton_nt_xent_bwd
        dz, dz_pair, dtemperature = run(drows.contiguous(), unit, inv_norm, lse, temperature, ctx.tau)
        return dz, dz_pair, None if temperature is None else dtemperature, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if in_dims[2] is not None:
            return batching.one_by_one(_NTXent.apply, info.batch_size, in_dims, args)
        z, z_pair = (batching.front(x, dim, info.batch_size) for x, dim in zip(args[:2], in_dims[:2], strict=True))
        outs = _NTXent.apply(z.flatten(0, 1).contiguous(), z_pair.flatten(0, 1).contiguous(), *args[2:])
        return tuple(out.unflatten(0, z.shape[:2]) for out in outs), (0,) * len(outs)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        positive: Tensor,
        exclude: Tensor | None,
        temperature: Tensor | None,
        tau: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        operators = torch.ops.anomem
        run = operators.native_info_nce_fwd if backend == "native" else operators.triton_info_nce_fwd
        return tuple(run(rows, columns, positive, exclude, temperature, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, columns, positive, exclude, temperature, ctx.tau, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, positive, exclude, temperature, *output[1:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dloss is None:
            return (None,) * 7
        rows, columns, positive, exclude, temperature, lse, *unit = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if composite.wants_graph():
            drows, dcolumns, dtemperature = composite.differentiable_gradients(
                _info_nce_composite(positive, exclude, ctx.tau),
                (rows, columns, temperature),
                (needed[0], needed[1], needed[4]),
                (dloss,),
            )
            return drows, dcolumns, None, None, dtemperature, None, None
        operators = torch.ops.anomem
        run = operators.native_info_nce_bwd if ctx.backend == "native" else operators.triton_info_nce_bwd
        drows, dcolumns, dtemperature = run(dloss.contiguous(), *unit, lse, positive, exclude, temperature, ctx.tau)
        return drows, dcolumns, None, None, None if temperature is None else dtemperature, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if any(dim is not None for dim in in_dims[2:]):
            return batching.one_by_one(_InfoNCE.apply, info.batch_size, in_dims, args)
        rows, columns = (batching.front(x, dim, info.batch_size) for x, dim in zip(args[:2], in_dims[:2], strict=True))
        outs = _InfoNCE.apply(rows.flatten(0, 1).contiguous(), columns.flatten(0, 1).contiguous(), *args[2:])
        return tuple(out.unflatten(0, rows.shape[:2]) for out in outs), (0,) * len(outs)


def _nt_xent_composite(tau: float) -> Any:
    def run(z: Tensor, z_pair: Tensor, temperature: Tensor | None) -> Tensor:
        from anomem.reference import nt_xent_rows

        dtype = accumulator(z)
        return nt_xent_rows(z.to(dtype), z_pair.to(dtype), tau if temperature is None else temperature)

    return run


def _info_nce_composite(positive: Tensor, exclude: Tensor | None, tau: float) -> Any:
    def run(rows: Tensor, columns: Tensor, temperature: Tensor | None) -> Tensor:
        from anomem.reference import info_nce_rows

        dtype = accumulator(rows)
        chosen = tau if temperature is None else temperature
        return info_nce_rows(rows.to(dtype), columns.to(dtype), positive, exclude, chosen)

    return run
