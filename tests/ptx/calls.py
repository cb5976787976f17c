"""One small launch of each kernel with products: inputs with tails, the float64 result, and the largest error allowed.

The formulas at the top of the kernels' files are written again here, in numpy.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from anomem.kernels.shipped_kernels import Spec
from tests.ptx.compiled import Compiled
from tests.ptx.formats import Array, from_bf16, to_bf16
from tests.ptx.machine import launch
from tests.ptx.memory import GlobalMemory

GROUPS, TAU, BETA = 2, 0.15, 0.7
# A result is right within this error: half precision by its own rounding, TF32 by the rounding of its operands.
HALF, TF32, EXACT = 8e-3, 1.5e-3, 2e-5


class Call:
    """Arguments of a launch, by their names.

    Args:
        compiled: the kernel.
        copies_need_fence: see `SharedMemory`.
    """

    def __init__(self, compiled: Compiled, *, copies_need_fence: bool = True) -> None:
        self.compiled, self.copies_need_fence = compiled, copies_need_fence
        self.spec: Spec = compiled.spec
        self.constants = self.spec.constants
        self.memory = GlobalMemory()
        self.arguments: dict[str, int | float] = {}
        self.random = np.random.default_rng(zlib.crc32(repr(sorted(self.spec.signature.items())).encode()))
        first = next(kind for kind in self.spec.signature.values() if kind.startswith("*"))
        self.kind = first.removeprefix("*")

    @property
    def tolerance(self) -> float:
        """Of a result of the rows' dtype."""
        return HALF if self.kind != "fp32" else TF32 if self.constants.get("PRECISION") == "tf32" else EXACT

    def has(self, name: str) -> bool:
        """Whether the kernel was compiled with this argument."""
        return self.spec.signature.get(name, "constexpr") != "constexpr"

    def rounded(self, x: Array) -> Array:
        """x as rows hold it, in float64; operands of TF32 products were rounded before."""
        x = np.asarray(x, np.float32)
        if self.kind == "bf16":
            return from_bf16(to_bf16(x)).astype(np.float64)
        if self.kind == "fp16":
            return x.astype(np.float16).astype(np.float64)
        if self.constants.get("PRECISION") == "tf32":
            x = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        return x.astype(np.float64)

    def draw(self, *shape: int) -> Array:
        """Rows with normal numbers."""
        return self.rounded(self.random.standard_normal(shape))

    def rows(self, name: str, x: Array) -> None:
        """An input in the rows' dtype."""
        stored = {"bf16": lambda: to_bf16(np.asarray(x, np.float32)), "fp16": lambda: x.astype(np.float16)}
        self._place(name, stored.get(self.kind, lambda: x.astype(np.float32))())

    def whole_vectors(self, name: str, x: Array) -> None:
        """An input in the rows' dtype, filled with zeros up to a multiple of 16 bytes as scaled rows are."""
        width = 8 if self.kind in ("bf16", "fp16") else 4
        self.rows(name, np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % width)]))

    def numbers(self, name: str, x: Any, dtype: Any = np.float32) -> None:
        """An input in float32, or in int64."""
        self._place(name, np.asarray(x, dtype))

    def empty(self, name: str, *shape: int, like_rows: bool = False) -> None:
        """An output."""
        dtype = {"bf16": np.uint16, "fp16": np.float16}.get(self.kind, np.float32) if like_rows else np.float32
        self.arguments[name] = self.memory.add(name, np.zeros(shape, dtype), output=True)

    def result(self, name: str) -> Array:
        """An output in float64, of which every byte was written."""
        array = self.memory.result(name)
        return (from_bf16(array) if array.dtype == np.uint16 else array).astype(np.float64)

    def launch(self, *grid: int, **numbers: float) -> None:
        """Run the kernel."""
        given = self.arguments | numbers
        names = [name for name, kind in self.spec.signature.items() if kind != "constexpr"]
        sizes = (*grid, 1, 1)
        launch(
            self.compiled.program, self.memory, [given[name] for name in names], (sizes[0], sizes[1], sizes[2]),
            warps=self.spec.tile.warps, shared_bytes=self.compiled.shared_bytes,
            copies_need_fence=self.copies_need_fence,
        )  # fmt: skip

    def _place(self, name: str, array: Array) -> None:
        self.arguments[name] = self.memory.add(name, array)


def errors(call: Call) -> dict[str, float]:
    """Run a kernel; each result's error over the error allowed."""
    name = call.spec.kernel.__name__.removesuffix("_kernel")
    run = {
        "contrast_forward": contrast_forward,
        "contrast_backward": contrast_backward,
        "contrast_chunked_weights": contrast_chunked_weights,
        "retrieve_flash_forward": retrieve_forward,
        "retrieve_resident": retrieve_forward,
        "retrieve_chunked_weights": retrieve_chunked_weights,
        "retrieve_flash_query_gradient": query_gradient,
        "retrieve_flash_prototype_sums": prototype_sums,
    }[name]
    return run(call)


def relative(actual: Array, exact: Array) -> float:
    """Distance over length; inf where a result is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - exact) / max(float(np.linalg.norm(exact)), 1e-30))


def absolute(actual: Array, exact: Array) -> float:
    """Largest difference; inf where a result is not finite."""
    return float(np.abs(actual - exact).max()) if np.isfinite(actual).all() else float("inf")


def ceil(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


class Contrast:
    """Two matrices of rows, their cosines and losses.

    Args:
        call: of a contrast kernel.
        rows: R.
        columns: C; None for two joined views.
    """

    def __init__(self, call: Call, rows: int, columns: int | None) -> None:
        features = call.constants["FEATURES"]
        self.s, self.inverse, self.u = self._scaled(call.draw(GROUPS, rows, features))
        self.t, self.other_inverse, self.v = self.s, self.inverse, self.u
        index = np.arange(rows)
        if columns is None:
            columns, self.positive, self.exclude = rows, (index + rows // 2) % rows, index
        else:
            self.t, self.other_inverse, self.v = self._scaled(call.draw(GROUPS, columns, features))
            self.positive = call.random.integers(0, columns, rows)
            self.exclude = (self.positive + 1 + call.random.integers(0, columns - 1, rows)) % columns
        tau = float(np.float32(TAU))
        self.logit = np.einsum("gid,gjd->gij", self.u, self.v) / tau
        masked = self.logit.copy()
        masked[:, index, self.exclude] = -np.inf
        largest = masked.max(-1, keepdims=True)
        weights = np.exp(masked - largest)
        self.lse = (largest + np.log(weights.sum(-1, keepdims=True)))[..., 0]
        self.loss = self.lse - self.logit[:, index, self.positive]
        self.weights = weights / weights.sum(-1, keepdims=True)
        self.weights[:, index, self.positive] -= 1
        if call.has("temperature"):
            call.numbers("temperature", tau)
        if call.has("positive"):
            call.numbers("positive", self.positive, np.int64)
        if call.has("exclude"):
            call.numbers("exclude", self.exclude, np.int64)

    @staticmethod
    def _scaled(raw: Array) -> tuple[Array, Array, Array]:
        """Scaled rows, 1/|row| in float32 and unit rows: u = m s."""
        inverse = (1 / np.linalg.norm(raw, axis=-1)).astype(np.float32)
        mantissa, exponent = np.frexp(inverse)
        scaled = raw * np.exp2(exponent)[..., None]
        return scaled, inverse, scaled * mantissa[..., None]


def contrast_forward(call: Call) -> dict[str, float]:
    """Loss and lse; from the partial sums of two splits if the kernel writes those."""
    block_r, block_c = call.constants["BLOCK_R"], call.constants["BLOCK_C"]
    joined = not call.has("positive")
    rows = 2 * (block_r // 2 + 13) if joined else block_r + 9
    case = Contrast(call, rows, None if joined else 2 * block_c + 5)
    columns = case.t.shape[1]
    call.whole_vectors("scaled_rows", case.s)
    call.numbers("row_inverse", case.inverse)
    call.arguments["scaled_columns"] = call.arguments["scaled_rows"]
    call.arguments["column_inverse"] = call.arguments["row_inverse"]
    if not joined:
        call.whole_vectors("scaled_columns", case.t)
        call.numbers("column_inverse", case.other_inverse)
    in_parts = call.has("partial")
    length = ceil(ceil(columns, block_c), 2 if in_parts else 1) * block_c
    splits = ceil(columns, length)
    if in_parts:
        call.empty("partial", 3, splits, GROUPS, rows)
    call.empty("loss", GROUPS, rows)
    call.empty("lse", GROUPS, rows)
    call.launch(
        GROUPS * splits * ceil(rows, block_r), inverse_tau=1 / TAU, groups=GROUPS, row_count=rows,
        column_count=columns, splits=splits, columns_per_split=length,
    )  # fmt: skip
    if in_parts:
        shift, total, matched = call.result("partial")
        largest = shift.max(0)
        total = (total * np.exp((shift - largest) / TAU)).sum(0)
        positive = matched.sum(0) / TAU
        lse = np.logaddexp(largest / TAU + np.log(total), positive)  # the sums are those of the negatives
        loss = lse - positive
    else:
        lse, loss = call.result("lse"), call.result("loss")
    allowed = TF32 if call.constants["PRECISION"] == "tf32" else EXACT  # products of halves are exact
    return {"lse": absolute(lse, case.lse) / allowed, "loss": absolute(loss, case.loss) / allowed}


def contrast_backward(call: Call) -> dict[str, float]:
    """Gradient of the raw rows, or its partial sums, and the moment."""
    role, block_x, block_y = (call.constants[name] for name in ("ROLE", "BLOCK_X", "BLOCK_Y"))
    joined = role == 0
    rows = 2 * (block_x // 2 + 13) if joined else block_x + 9
    case = Contrast(call, rows, None if joined else 2 * block_y + 5)
    upstream = call.random.standard_normal((GROUPS, rows))
    weights = case.weights * upstream[..., None]
    weights[:, np.arange(rows), case.exclude] = 0
    if joined:
        weights = weights + weights.transpose(0, 2, 1)
    owned, inverse, u, streamed, other, v = case.s, case.inverse, case.u, case.t, case.other_inverse, case.v
    if role == 2:
        weights = weights.transpose(0, 2, 1)
        owned, inverse, u, streamed, other, v = streamed, other, v, owned, inverse, u
    (count, features), streamed_count = owned.shape[1:], streamed.shape[1]
    du = np.einsum("gxy,gyd->gxd", weights, v) / TAU
    dx = (du - u * (u * du).sum(-1, keepdims=True)) * inverse.astype(np.float64)[..., None]
    moment = (weights * np.einsum("gxd,gyd->gxy", u, v) / TAU).sum(-1)

    call.whole_vectors("owned", owned)
    call.numbers("owned_inverse", inverse)
    call.arguments["streamed"], call.arguments["streamed_inverse"] = (
        call.arguments["owned"], call.arguments["owned_inverse"]
    )  # fmt: skip
    if not joined:
        call.whole_vectors("streamed", streamed)
        call.numbers("streamed_inverse", other)
    call.numbers("loss", case.loss)
    call.numbers("lse", case.lse)
    call.numbers("upstream", upstream)
    if call.has("peak"):
        call.numbers("peak", np.abs(upstream).max(1))
    in_parts = call.has("partial")
    border = count // 2 if joined else count
    length = ceil(ceil(streamed_count, block_y), 2 if in_parts else 1) * block_y
    splits = ceil(streamed_count, length)
    if in_parts:
        call.empty("partial", splits, GROUPS, count, features)
    call.empty("first", GROUPS, border, features, like_rows=True)
    if call.has("second"):
        call.empty("second", GROUPS, count - border, features, like_rows=True)
    if call.has("moment"):
        call.empty("moment", splits, GROUPS, count)
    call.launch(
        GROUPS * splits * ceil(count, block_x),
        inverse_tau=1 / TAU, groups=GROUPS, owned_count=count, streamed_count=streamed_count, border=border,
        splits=splits, streamed_per_split=length,
    )  # fmt: skip
    if in_parts:
        found = {"du": relative(call.result("partial").sum(0), du) / call.tolerance}
    else:
        halves = [call.result("first"), *([call.result("second")] if call.has("second") else [])]
        found = {"dx": relative(np.concatenate(halves, 1), dx) / call.tolerance}
    if call.has("moment"):
        found["moment"] = relative(call.result("moment").sum(0), moment) / call.tolerance
    return found


def contrast_chunked_weights(call: Call) -> dict[str, float]:
    """Weights times both rows' factors, of a chunk that begins after the first rows, and the moment."""
    block_x, block_y = call.constants["BLOCK_X"], call.constants["BLOCK_Y"]
    joined = not call.has("positive")
    rows = 2 * (block_x + 13) if joined else 2 * block_x + 9
    case = Contrast(call, rows, None if joined else 2 * block_y + 5)
    columns, first, end = case.t.shape[1], 24, rows - 3
    upstream = call.random.standard_normal((GROUPS, rows))
    weights = case.weights * upstream[..., None]
    weights[:, np.arange(rows), case.exclude] = 0
    if joined:
        weights = weights + weights.transpose(0, 2, 1)
    weights = weights[:, first:end]
    factors = [np.frexp(inverse)[0].astype(np.float64) for inverse in (case.inverse, case.other_inverse)]
    call.whole_vectors("scaled_rows", case.s)
    call.numbers("row_inverse", case.inverse)
    call.arguments["scaled_columns"] = call.arguments["scaled_rows"]
    call.arguments["column_inverse"] = call.arguments["row_inverse"]
    if not joined:
        call.whole_vectors("scaled_columns", case.t)
        call.numbers("column_inverse", case.other_inverse)
    call.numbers("loss", case.loss)
    call.numbers("lse", case.lse)
    call.numbers("upstream", upstream)
    scale = np.ones(GROUPS)
    if call.has("peak"):
        call.numbers("peak", np.abs(upstream).max(1))
        scale = 8192 / np.abs(upstream).max(1)
    programs = GROUPS * ceil(end - first, block_x) * ceil(columns, block_y)
    call.empty("weights", GROUPS, end - first, columns, like_rows=True)
    if call.has("moment"):
        call.empty("moment", programs)
    call.launch(
        programs, inverse_tau=1 / TAU, first_row=first, end_row=end, row_count=rows, column_count=columns,
    )  # fmt: skip
    exact = weights * factors[0][:, first:end, None] * factors[1][:, None, :] * scale[:, None, None]
    found = {"weights": relative(call.result("weights"), exact) / call.tolerance}
    if call.has("moment"):
        moment = (weights * case.logit[:, first:end]).sum()
        size = np.abs(weights * case.logit[:, first:end]).sum()
        found["moment"] = abs(call.result("moment").sum() - moment) / size / call.tolerance
    return found


class Retrieval:
    """Queries against a memory.

    Args:
        call: of a retrieval kernel.
        queries: N.
        prototypes: M.
        normalize: of the queries.
    """

    def __init__(self, call: Call, queries: int, prototypes: int, normalize: int) -> None:
        d, dv = call.constants["D"], call.constants["DV"]
        self.scale = 1.3 / d**0.5
        self.b = float(np.float32(BETA)) * self.scale
        self.query, self.keys = call.draw(queries, d), call.draw(prototypes, d)
        separate = call.has("values") and not call.constants.get("TIED", False)
        self.values = call.draw(prototypes, dv) if separate else self.keys
        self.unit, self.factor = self._normalized(self.query, normalize)
        operand = call.rounded(self.unit) if normalize else self.query
        self.scores = self.b * operand @ self.keys.T
        largest = self.scores.max(-1, keepdims=True)
        exponentials = np.exp(self.scores - largest)
        self.weights = exponentials / exponentials.sum(-1, keepdims=True)
        self.lse = (largest + np.log(exponentials.sum(-1, keepdims=True)))[:, 0]
        self.normaliser = np.concatenate([largest / self.b, np.log2(exponentials.sum(-1, keepdims=True))], 1)
        call.rows("query", self.query)
        call.rows("keys", self.keys)
        if separate:
            call.rows("values", self.values)
        elif call.has("values"):
            call.arguments["values"] = call.arguments["keys"]
        call.numbers("beta", BETA)
        self.numbers = {"N": queries, "M": prototypes, "query_stride": d, "scale": self.scale}

    def upstream(self, call: Call) -> tuple[Array, Array, Array]:
        """Places dout, lse and delta; (dout, dlse, dS)."""
        dout = call.draw(len(self.query), self.values.shape[1])
        dlse = call.random.standard_normal(len(self.query))
        dweights = dout @ self.values.T
        delta = (self.weights * dweights).sum(-1) - dlse
        call.rows("dout", dout)
        call.numbers("normaliser", self.normaliser)
        call.numbers("delta", delta)
        return dout, dlse, self.weights * (dweights - delta[:, None])

    @staticmethod
    def _normalized(x: Array, normalize: int) -> tuple[Array, Array]:
        if normalize == 0:
            return x, np.ones((len(x), 1))
        if normalize == 1:
            x = x - x.mean(-1, keepdims=True)
            factor = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        else:
            factor = 1 / np.linalg.norm(x, axis=-1, keepdims=True)
        return x * factor, factor


def retrieve_forward(call: Call) -> dict[str, float]:
    """Output and log-sum-exp, with whole rows or slices of them."""
    block_n, block_m = call.constants["BLOCK_N"], call.constants["BLOCK_M"]
    resident = "NORMALIZE" not in call.constants
    case = Retrieval(
        call, block_n + 11, block_m - 7 if resident else 2 * block_m + 5, call.constants.get("NORMALIZE", 0)
    )
    call.empty("out", len(case.query), case.values.shape[1], like_rows=True)
    call.empty("lse", len(case.query))
    call.empty("normaliser", len(case.query), 2)
    call.launch(ceil(len(case.query), block_n), **case.numbers)
    shift, log_total = call.result("normaliser").T
    return {
        "out": relative(call.result("out"), case.weights @ case.values) / call.tolerance,
        "lse": absolute(call.result("lse"), case.lse) / call.tolerance,
        "normaliser": absolute(case.b * shift + log_total * np.log(2), case.lse) / call.tolerance,
    }


def retrieve_chunked_weights(call: Call) -> dict[str, float]:
    """P and b dS, and the partial sums of dbeta."""
    block_n, block_m = call.constants["BLOCK_N"], call.constants["BLOCK_M"]
    case = Retrieval(call, block_n + 11, block_m + 5, 0)
    _, dlse, dscores = case.upstream(call)
    if call.has("dlse"):
        call.numbers("dlse", dlse)
    programs = ceil(len(case.query), block_n) * ceil(len(case.keys), block_m)
    for name in ("weights", "dscores"):
        call.empty(name, len(case.query), len(case.keys), like_rows=True)
    call.empty("dbeta", programs)
    call.launch(programs, **case.numbers)
    dbeta = (dscores * case.scores / case.b).sum() * case.scale
    return {
        "weights": relative(call.result("weights"), case.weights) / call.tolerance,
        "dscores": relative(call.result("dscores"), case.b * dscores) / call.tolerance,
        "dbeta": abs(call.result("dbeta").sum() - dbeta) / abs(dbeta) / call.tolerance,
    }


def query_gradient(call: Call) -> dict[str, float]:
    """dQ and the partial sums of dbeta."""
    block_n, normalize = call.constants["BLOCK_N"], call.constants["NORMALIZE"]
    case = Retrieval(call, block_n + 11, 2 * call.constants["BLOCK_M"] + 5, normalize)
    _, dlse, dscores = case.upstream(call)
    call.numbers("dlse", dlse)
    call.numbers("keys_mean", case.keys.mean(0))
    call.empty("dquery", *case.query.shape, like_rows=True)
    call.empty("dbeta", ceil(len(case.query), block_n))
    call.launch(ceil(len(case.query), block_n), **case.numbers)
    du, u = case.b * dscores @ case.keys, case.unit
    if normalize == 1:
        du = du - du.mean(-1, keepdims=True) - u * (du * u).mean(-1, keepdims=True)
    elif normalize == 2:
        du = du - u * (du * u).sum(-1, keepdims=True)
    dbeta = (dscores * case.scores / case.b).sum() * case.scale
    return {
        "dquery": relative(call.result("dquery"), du * case.factor) / call.tolerance,
        "dbeta": abs(call.result("dbeta").sum() - dbeta) / abs(dbeta) / call.tolerance,
    }


def prototype_sums(call: Call) -> dict[str, float]:
    """dK + dV, dK or dV, in two spans of queries."""
    part, block_n, block_m = (call.constants[name] for name in ("PART", "BLOCK_N", "BLOCK_M"))
    case = Retrieval(call, 5 * block_n + 11, block_m + 5, 0)
    dout, _, dscores = case.upstream(call)
    span = ceil(ceil(len(case.query), block_n), 2) * block_n
    width = call.constants["DV" if part == 2 else "D"]
    call.empty("partials", 2, len(case.keys), width)
    call.launch(ceil(len(case.keys), block_m), 2, span=span, **case.numbers)
    keys, values = case.b * dscores.T @ case.query, case.weights.T @ dout
    exact = keys if part == 1 else values if part == 2 else keys + values
    return {"sums": relative(call.result("partials").sum(0), exact) / call.tolerance}
