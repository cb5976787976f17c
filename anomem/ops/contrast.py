"""NT-Xent and its rectangular form, one loss per row, with gradients to the un-normalised rows and the temperature.

A forward returns the loss and what its backward wants beside it (`anomem.reference.contrast` derives the gradients):

    Triton   lse of each row; the row scaled by a power of two to a length in [1, 2), with zeros up to a multiple of
             16 bytes; and 1/norm, whose mantissa is that length's inverse
    native   total of each row, the sum whose logarithm is its lse or the log-sum of its negatives; and 1/norm, with
             which the backward normalises the rows again; where they are kept the products u·u of the tiles, so that
             the backward makes 3 of the products instead of 4 (InfoNCE: 4 instead of 6)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, autograd

from anomem import reference
from anomem.ops import library
from anomem.ops.library import (
    accumulator,
    define,
    empty,
    empty_scalar,
    unit_inner_stride,
)

KEPT_BYTES = 31 << 20
"""Most memory of the products that one call on a CPU keeps for its backward pass; it makes the others again.

A block of 32 MiB and more is mapped anew by glibc in every call: in trials its new pages could cost more than the
products (AMD family 25, no rows).

Half of it below `_LONG_ROWS` features: products of shorter rows that leave the third-level cache are read back
more slowly than they are made (measured on AMD family 25).
"""
_LONG_ROWS = {torch.float32: 128, torch.float64: 128, torch.bfloat16: 256}
_LEAST_KEPT_ROWS = 126
_LEAST_KEPT_FEATURES = {torch.float32: 64, torch.float64: 64, torch.bfloat16: 128}
_LEAST_KEPT_SHARE = 1 / 8
"""Of the tiles; fewer products save less than a thirtieth of a call."""
_TILE = 128


def _native_nt_xent_fake(
    z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups, batch, _ = z.shape
    rows, total, inv_norm = (empty(z, groups, 2 * batch, dtype=accumulator(z)) for _ in range(3))
    return rows, total, inv_norm


def _native_nt_xent_backward_fake(
    drows: Tensor,
    z: Tensor,
    z_pair: Tensor,
    rows: Tensor,
    total: Tensor,
    inv_norm: Tensor,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(z, *z.shape), empty(z_pair, *z_pair.shape), empty_scalar(temperature, total)


def _kept_nt_xent_fake(
    z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, batch, _ = z.shape
    products = empty(z, kept, _nt_xent_tiles(2 * batch, groups)[1], dtype=accumulator(z))
    return *_native_nt_xent_fake(z, z_pair, temperature, tau), products


def _kept_nt_xent_backward_fake(
    drows: Tensor,
    z: Tensor,
    z_pair: Tensor,
    rows: Tensor,
    total: Tensor,
    inv_norm: Tensor,
    products: Tensor,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _native_nt_xent_backward_fake(drows, z, z_pair, rows, total, inv_norm, temperature, tau)


def _tile_rows(rows: int, groups: int) -> int:
    return _TILE if rows >= 1024 or rows <= _TILE or groups >= 4 else _TILE // 2  # as in csrc/cpu/contrast.h


def _nt_xent_tiles(rows: int, groups: int) -> tuple[int, int]:
    """Tiles of a group, and elements of a kept one; as in csrc/cpu/contrast.h."""
    tile = _tile_rows(rows, groups)
    tiles = (rows + tile - 1) // tile
    return tiles * (tiles + 1) // 2, tile * (tile + 16)


def _info_nce_tiles(rows: int, columns: int, groups: int) -> tuple[int, int]:
    """Tiles of a group, and elements of a kept one; as in csrc/cpu/contrast.h."""
    tile = _tile_rows(rows, groups)
    return ((rows + tile - 1) // tile) * ((columns + _TILE - 1) // _TILE), tile * (_TILE + 16)


def _whole_vectors(features: int, rows: Tensor) -> int:
    """The length of Triton's scaled rows: features up to the next 16 bytes."""
    step = 16 // rows.dtype.itemsize
    return (features + step - 1) // step * step


def _triton_nt_xent_fake(
    z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, batch, features = z.shape
    rows, lse, inv_norm = _native_nt_xent_fake(z, z_pair, temperature, tau)
    return rows, lse, empty(z, groups, 2 * batch, _whole_vectors(features, z)), inv_norm


def _triton_nt_xent_backward_fake(
    drows: Tensor,
    rows: Tensor,
    lse: Tensor,
    unit: Tensor,
    inv_norm: Tensor,
    temperature: Tensor | None,
    tau: float,
    features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, count, _ = unit.shape
    dz, dz_pair = (empty(unit, groups, count // 2, features) for _ in range(2))
    return dz, dz_pair, empty_scalar(temperature, lse)


def _native_info_nce_fake(
    rows: Tensor, columns: Tensor, positive: Tensor, exclude: Tensor | None, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, total, inv_norm_rows = (empty(rows, *rows.shape[:2], dtype=accumulator(rows)) for _ in range(3))
    return loss, total, inv_norm_rows, empty(rows, *columns.shape[:2], dtype=accumulator(rows))


def _native_info_nce_backward_fake(
    dloss: Tensor,
    rows: Tensor,
    columns: Tensor,
    loss: Tensor,
    total: Tensor,
    inv_norm_rows: Tensor,
    inv_norm_columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(rows, *rows.shape), empty(columns, *columns.shape), empty_scalar(temperature, total)


def _kept_info_nce_fake(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, elements = _info_nce_tiles(rows.shape[1], columns.shape[1], rows.shape[0])
    products = empty(rows, kept, elements, dtype=accumulator(rows))
    return *_native_info_nce_fake(rows, columns, positive, exclude, temperature, tau), products


def _kept_info_nce_backward_fake(
    dloss: Tensor,
    rows: Tensor,
    columns: Tensor,
    loss: Tensor,
    total: Tensor,
    inv_norm_rows: Tensor,
    inv_norm_columns: Tensor,
    products: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(rows, *rows.shape), empty(columns, *columns.shape), empty_scalar(temperature, total)


def _triton_info_nce_fake(
    rows: Tensor, columns: Tensor, positive: Tensor, exclude: Tensor | None, temperature: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, lse, inv_norm_rows, inv_norm_columns = _native_info_nce_fake(
        rows, columns, positive, exclude, temperature, tau
    )
    unit_rows, unit_columns = (empty(x, *x.shape[:2], _whole_vectors(x.shape[2], x)) for x in (rows, columns))
    return loss, lse, unit_rows, unit_columns, inv_norm_rows, inv_norm_columns


def _triton_info_nce_backward_fake(
    dloss: Tensor,
    loss: Tensor,
    lse: Tensor,
    unit_rows: Tensor,
    unit_columns: Tensor,
    inv_norm_rows: Tensor,
    inv_norm_columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    drows, dcolumns = (empty(unit, *unit.shape[:2], features) for unit in (unit_rows, unit_columns))
    return drows, dcolumns, empty_scalar(temperature, lse)


define(
    "native_nt_xent_fwd",
    "(Tensor z, Tensor z_pair, Tensor? temperature, float tau) -> (Tensor rows, Tensor total, Tensor inv_norm)",
    _native_nt_xent_fake,
)
define(
    "native_nt_xent_bwd",
    "(Tensor drows, Tensor z, Tensor z_pair, Tensor rows, Tensor total, Tensor inv_norm, Tensor? temperature, "
    "float tau) -> (Tensor dz, Tensor dz_pair, Tensor dtemperature)",
    _native_nt_xent_backward_fake,
)
define(
    "native_nt_xent_kept_fwd",
    "(Tensor z, Tensor z_pair, Tensor? temperature, float tau, int kept) -> "
    "(Tensor rows, Tensor total, Tensor inv_norm, Tensor products)",
    _kept_nt_xent_fake,
)
define(
    "native_nt_xent_kept_bwd",
    "(Tensor drows, Tensor z, Tensor z_pair, Tensor rows, Tensor total, Tensor inv_norm, Tensor products, "
    "Tensor? temperature, float tau) -> (Tensor dz, Tensor dz_pair, Tensor dtemperature)",
    _kept_nt_xent_backward_fake,
)
define(
    "triton_nt_xent_fwd",
    "(Tensor z, Tensor z_pair, Tensor? temperature, float tau) -> "
    "(Tensor rows, Tensor lse, Tensor unit, Tensor inv_norm)",
    _triton_nt_xent_fake,
)
define(
    "triton_nt_xent_bwd",
    "(Tensor drows, Tensor rows, Tensor lse, Tensor unit, Tensor inv_norm, Tensor? temperature, float tau, "
    "SymInt features) -> (Tensor dz, Tensor dz_pair, Tensor dtemperature)",
    _triton_nt_xent_backward_fake,
)
define(
    "native_info_nce_fwd",
    "(Tensor rows, Tensor columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor loss, Tensor total, Tensor inv_norm_rows, Tensor inv_norm_columns)",
    _native_info_nce_fake,
)
define(
    "native_info_nce_bwd",
    "(Tensor dloss, Tensor rows, Tensor columns, Tensor loss, Tensor total, Tensor inv_norm_rows, "
    "Tensor inv_norm_columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor drows, Tensor dcolumns, Tensor dtemperature)",
    _native_info_nce_backward_fake,
)
define(
    "native_info_nce_kept_fwd",
    "(Tensor rows, Tensor columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau, int kept) -> "
    "(Tensor loss, Tensor total, Tensor inv_norm_rows, Tensor inv_norm_columns, Tensor products)",
    _kept_info_nce_fake,
)
define(
    "native_info_nce_kept_bwd",
    "(Tensor dloss, Tensor rows, Tensor columns, Tensor loss, Tensor total, Tensor inv_norm_rows, "
    "Tensor inv_norm_columns, Tensor products, Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor drows, Tensor dcolumns, Tensor dtemperature)",
    _kept_info_nce_backward_fake,
)
define(
    "triton_info_nce_fwd",
    "(Tensor rows, Tensor columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau) -> "
    "(Tensor loss, Tensor lse, Tensor unit_rows, Tensor unit_columns, Tensor inv_norm_rows, Tensor inv_norm_columns)",
    _triton_info_nce_fake,
)
define(
    "triton_info_nce_bwd",
    "(Tensor dloss, Tensor loss, Tensor lse, Tensor unit_rows, Tensor unit_columns, Tensor inv_norm_rows, "
    "Tensor inv_norm_columns, Tensor positive, Tensor? exclude, Tensor? temperature, float tau, "
    "SymInt features) -> (Tensor drows, Tensor dcolumns, Tensor dtemperature)",
    _triton_info_nce_backward_fake,
)


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
    kept = _kept((z, z_pair, temperature), 2 * z.shape[1], _nt_xent_tiles, backend)
    rows: Tensor = library.apply(_NTXent, z, z_pair, temperature, tau, backend, kept)[0]
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
    kept = _kept(
        (rows, columns, temperature), rows.shape[1], partial(_info_nce_tiles, columns=columns.shape[1]), backend
    )
    loss: Tensor = library.apply(_InfoNCE, rows, columns, positive, exclude, temperature, tau, backend, kept)[0]
    return loss


def _kept(
    inputs: tuple[Tensor, Tensor, Tensor | None], rows: int, tiles_of: Callable[..., tuple[int, int]], backend: str
) -> int:
    """Tiles whose products are kept for the backward pass.

    None without gradients, in small calls, where a product costs no more than its memory, and under a compiler, whose
    graphs serve other sizes.
    """
    if torch.compiler.is_compiling() or backend != "native" or inputs[0].device.type != "cpu":
        return 0
    if rows < _LEAST_KEPT_ROWS or inputs[0].shape[2] < _LEAST_KEPT_FEATURES[inputs[0].dtype]:
        return 0
    if torch._C._are_functorch_transforms_active():  # vmap would give each element its part of the products
        return 0
    if not library.may_be_differentiated(inputs):
        return 0
    groups, _, features = inputs[0].shape
    tiles, elements = tiles_of(rows=rows, groups=groups)
    most = KEPT_BYTES if features >= _LONG_ROWS[inputs[0].dtype] else KEPT_BYTES // 2
    kept = min(groups * tiles, most // (elements * accumulator(inputs[0]).itemsize))
    return kept if kept >= _LEAST_KEPT_SHARE * groups * tiles else 0


class _NTXent(autograd.Function):
    @staticmethod
    def forward(
        z: Tensor, z_pair: Tensor, temperature: Tensor | None, tau: float, backend: str, kept: int
    ) -> tuple[Tensor, ...]:
        if kept:
            return tuple(library.call("nt_xent_kept_fwd", backend, z, z_pair, temperature, tau, kept))
        return tuple(library.call("nt_xent_fwd", backend, z, z_pair, temperature, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, z_pair, temperature, ctx.tau, ctx.backend, ctx.kept = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, z_pair, temperature, *output)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if drows is None:
            return (None,) * 6
        z, z_pair, *saved = ctx.saved_tensors
        z, z_pair = unit_inner_stride(z), unit_inner_stride(z_pair)
        temperature, *kept = library.contiguous(saved)
        if library.wants_graph():

            def composite(z: Tensor, z_pair: Tensor, temperature: Tensor | None) -> Tensor:
                return reference.nt_xent_rows(z, z_pair, ctx.tau if temperature is None else temperature)

            inputs = (z, z_pair, temperature)
            grads = library.differentiable_gradients(composite, inputs, ctx.needs_input_grad[:3], (drows,))
            return (*grads, None, None, None)
        views, features = ((z, z_pair), ()) if ctx.backend == "native" else ((), (z.shape[2],))
        dz, dz_pair, dtemperature = library.call(
            "nt_xent_kept_bwd" if ctx.kept else "nt_xent_bwd",
            ctx.backend,
            drows.contiguous(),
            *views,
            *kept,
            temperature,
            ctx.tau,
            *features,
        )
        return dz, dz_pair, None if temperature is None else dtemperature, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_NTXent.apply, 2, info, in_dims, args)


class _InfoNCE(autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor,
        columns: Tensor,
        positive: Tensor,
        exclude: Tensor | None,
        temperature: Tensor | None,
        tau: float,
        backend: str,
        kept: int,
    ) -> tuple[Tensor, ...]:
        if kept:
            given = (rows, columns, positive, exclude, temperature, tau, kept)
            return tuple(library.call("info_nce_kept_fwd", backend, *given))
        return tuple(library.call("info_nce_fwd", backend, rows, columns, positive, exclude, temperature, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, columns, positive, exclude, temperature, ctx.tau, ctx.backend, ctx.kept = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, positive, exclude, temperature, *output)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dloss is None:
            return (None,) * 8
        rows, columns, positive, exclude, temperature, *kept = library.contiguous(ctx.saved_tensors)
        if library.wants_graph():

            def composite(rows: Tensor, columns: Tensor, temperature: Tensor | None) -> Tensor:
                tau = ctx.tau if temperature is None else temperature
                return reference.info_nce_rows(rows, columns, positive, exclude, tau)

            needed = ctx.needs_input_grad
            drows, dcolumns, dtemperature = library.differentiable_gradients(
                composite, (rows, columns, temperature), (needed[0], needed[1], needed[4]), (dloss,)
            )
            return drows, dcolumns, None, None, dtemperature, None, None, None
        matrices, features = ((rows, columns), ()) if ctx.backend == "native" else ((), (rows.shape[2],))
        drows, dcolumns, dtemperature = library.call(
            "info_nce_kept_bwd" if ctx.kept else "info_nce_bwd",
            ctx.backend,
            dloss.contiguous(),
            *matrices,
            *kept,
            positive,
            exclude,
            temperature,
            ctx.tau,
            *features,
        )
        return drows, dcolumns, None, None, None if temperature is None else dtemperature, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_InfoNCE.apply, 2, info, in_dims, args)
