"""NT-Xent and its rectangular form, one loss per row, with gradients to the un-normalised rows and the temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem.ops import batching, composite
from anomem.ops.library import accumulator, define, empty, implement_with_triton, with_known_signature

# A forward returns the loss and what its backward wants. Triton: the lse of each row, the unit rows up to a factor
# between 1 and 2, and 1/norm, in which it finds that factor (see `anomem.kernels.contrast_rows`).
# Native: a total of each row (its lse, or the sum that this is the logarithm of) and 1/norm, because the backward makes
# the normalised rows again from the rows themselves.
_TEMPERATURE = "Tensor? temperature, float tau"
_NT_XENT = f"(Tensor z, Tensor z_pair, {_TEMPERATURE}) -> (Tensor rows, "
_NT_XENT_GRADIENTS = f"{_TEMPERATURE}) -> (Tensor dz, Tensor dz_pair, Tensor dtemperature)"
_INFO_NCE_INDEX = "Tensor positive, Tensor? exclude"
_INFO_NCE = f"(Tensor rows, Tensor columns, {_INFO_NCE_INDEX}, {_TEMPERATURE}) -> (Tensor loss, "
_INFO_NCE_GRADIENTS = f"{_INFO_NCE_INDEX}, {_TEMPERATURE}) -> (Tensor drows, Tensor dcolumns, Tensor dtemperature)"


# The fakes name the arguments on which shapes depend.
def _gradients_fake(first: Tensor, second: Tensor, lse: Tensor, temperature: Tensor | None) -> tuple[Tensor, ...]:
    dtemperature = empty(lse, 0) if temperature is None else empty(lse)
    return empty(first, *first.shape), empty(second, *second.shape), dtemperature


def _native_nt_xent_fake(z: Tensor, *_: Any) -> tuple[Tensor, ...]:
    groups, batch, _features = z.shape
    return tuple(empty(z, groups, 2 * batch, dtype=accumulator(z)) for _ in range(3))


def _native_nt_xent_gradients_fake(
    drows: Tensor, z: Tensor, z_pair: Tensor, inv_norm: Tensor, total: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, ...]:
    return _gradients_fake(z, z_pair, total, temperature)


def _triton_nt_xent_fake(z: Tensor, *_: Any) -> tuple[Tensor, ...]:
    groups, batch, features = z.shape
    rows, lse, inv_norm = _native_nt_xent_fake(z)
    return rows, lse, empty(z, groups, 2 * batch, features), inv_norm


def _triton_nt_xent_gradients_fake(
    drows: Tensor, unit: Tensor, inv_norm: Tensor, lse: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, ...]:
    views = unit[:, : unit.shape[1] // 2]
    return _gradients_fake(views, views, lse, temperature)


def _native_info_nce_fake(rows: Tensor, columns: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(empty(rows, *x.shape[:2], dtype=accumulator(rows)) for x in (rows, rows, rows, columns))


def _native_info_nce_gradients_fake(dloss: Tensor, rows: Tensor, columns: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, total, _positive, _exclude, temperature, _tau = rest
    return _gradients_fake(rows, columns, total, temperature)


def _triton_info_nce_fake(rows: Tensor, columns: Tensor, *_: Any) -> tuple[Tensor, ...]:
    loss, lse, *inv_norms = _native_info_nce_fake(rows, columns)
    return loss, lse, empty(rows, *rows.shape), empty(columns, *columns.shape), *inv_norms


_NORMS, _UNITS = "Tensor inv_norm_rows, Tensor inv_norm_columns", "Tensor unit_rows, Tensor unit_columns"
define("native_nt_xent_fwd", f"{_NT_XENT}Tensor total, Tensor inv_norm)", _native_nt_xent_fake)
define(
    "native_nt_xent_bwd",
    f"(Tensor drows, Tensor z, Tensor z_pair, Tensor inv_norm, Tensor total, {_NT_XENT_GRADIENTS}",
    _native_nt_xent_gradients_fake,
)
define("triton_nt_xent_fwd", f"{_NT_XENT}Tensor lse, Tensor unit, Tensor inv_norm)", _triton_nt_xent_fake)
define(
    "triton_nt_xent_bwd",
    f"(Tensor drows, Tensor unit, Tensor inv_norm, Tensor lse, {_NT_XENT_GRADIENTS}",
    _triton_nt_xent_gradients_fake,
)
define("native_info_nce_fwd", f"{_INFO_NCE}Tensor total, {_NORMS})", _native_info_nce_fake)
define(
    "native_info_nce_bwd",
    f"(Tensor dloss, Tensor rows, Tensor columns, {_NORMS}, Tensor total, {_INFO_NCE_GRADIENTS}",
    _native_info_nce_gradients_fake,
)
define("triton_info_nce_fwd", f"{_INFO_NCE}Tensor lse, {_UNITS}, {_NORMS})", _triton_info_nce_fake)
# Its units and lse stand where the native operator has the rows and their totals, and have the same shapes.
define(
    "triton_info_nce_bwd",
    f"(Tensor dloss, {_UNITS}, {_NORMS}, Tensor lse, {_INFO_NCE_GRADIENTS}",
    _native_info_nce_gradients_fake,
)
for _operator in ("nt_xent", "info_nce"):
    implement_with_triton(f"triton_{_operator}_fwd")
    implement_with_triton(f"triton_{_operator}_bwd")


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


@with_known_signature
class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float, backend: str) -> tuple[Tensor, ...]:
        operators = torch.ops.anomem
        run = operators.native_nt_xent_fwd if backend == "native" else operators.triton_nt_xent_fwd
        return tuple(run(z, z_pair, temperature, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, z_pair, temperature, ctx.tau, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, z_pair, temperature, *output[1:])

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if drows is None:
            return (None,) * 5
        z, z_pair, temperature, total, *kept = ctx.saved_tensors
        if composite.wants_graph():
            grads = composite.differentiable_gradients(
                _nt_xent_composite(ctx.tau), (z, z_pair, temperature), ctx.needs_input_grad[:3], (drows,)
            )
            return (*grads, None, None)
        operators = torch.ops.anomem
        drows = drows.contiguous()
        if ctx.backend == "native":
            gradients = operators.native_nt_xent_bwd(drows, z, z_pair, *kept, total, temperature, ctx.tau)
        else:
            gradients = operators.triton_nt_xent_bwd(drows, *kept, total, temperature, ctx.tau)
        dz, dz_pair, dtemperature = gradients
        return dz, dz_pair, None if temperature is None else dtemperature, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if in_dims[2] is not None:
            return batching.one_by_one(_NTXent.apply, info.batch_size, in_dims, args)
        z, z_pair = (batching.front(x, dim, info.batch_size) for x, dim in zip(args[:2], in_dims[:2], strict=True))
        outs = _NTXent.apply(z.flatten(0, 1).contiguous(), z_pair.flatten(0, 1).contiguous(), *args[2:])
        return tuple(out.unflatten(0, z.shape[:2]) for out in outs), (0,) * len(outs)


@with_known_signature
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
        rows, columns, positive, exclude, temperature, total, *kept = ctx.saved_tensors
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
        rest = (*kept, total, positive, exclude, temperature, ctx.tau)
        if ctx.backend == "native":
            gradients = operators.native_info_nce_bwd(dloss.contiguous(), rows, columns, *rest)
        else:
            gradients = operators.triton_info_nce_bwd(dloss.contiguous(), *rest)
        drows, dcolumns, dtemperature = gradients
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
