"""The committed choices: for which calls a kernel is known to be faster than the reference.

`AUTO` quotes rows of one processor or GPU; `RULES` say what is taken where nothing was measured. `anomem.backends` asks
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton", "native"]
IMPLEMENTATIONS: tuple[Impl, ...] = get_args(Impl)
OPERATORS = (
    "retrieve",
    "shrink",
    "nt_xent",
    "info_nce",
    "gather",
    "variance",
    "deviation_map",
    "usage",
    "nearest",
    "read",
    "augment",
    "batch_norm",
    "downsample",
    "conv3x3",
)


INFERENCE = ("deviation_map", "usage", "nearest", "read", "augment")
"""Operators without a gradient, and the read of a filled memory, whose gradient is the reference's."""
COPIES = ("gather", "variance", "augment", "batch_norm", "downsample")
"""Operators that only move memory."""


class Problem(NamedTuple):
    """One call, as far as the choice of an implementation depends on it."""

    operator: str
    device: str
    """Device type: "cpu" or "cuda"."""
    dtype: torch.dtype
    features: int
    """d, the length of a row."""
    rows: int = 0
    """N queries, rows of one group, or pixels of one image."""
    columns: int = 0
    """M prototypes, or columns of one group."""
    groups: int = 1
    """G, or images of a convolution."""
    steps: int = 1
    """Reads of the memory."""
    fake: bool = False
    """Whether the tensors have shapes alone: nothing is measured for them."""


def problem_of(
    operator: str,
    tensor: Tensor,
    *others: Tensor | None,
    features: int,
    rows: int = 0,
    columns: int = 0,
    groups: int = 1,
    steps: int = 1,
) -> Problem:
    """The problem of a call with these tensors; the first has its device and dtype, sizes are as in `Problem`."""
    fake = any(map(is_fake, (tensor, *others)))
    return Problem(operator, tensor.device.type, tensor.dtype, features, rows, columns, groups, steps, fake)


def is_fake(tensor: Tensor | None) -> bool:
    """Whether a tensor has a shape alone, also behind transforms of `torch.func`; False in a trace of torch.compile."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() and tensor is not None:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    # By the attribute: torch's module of fake tensors is slow to import, and a user of them has it.
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "fake_mode")


def work(problem: Problem) -> int:
    """Elements that a memory-bound operator moves, or multiplications of one product of scores."""
    elements = problem.groups * problem.rows * problem.features
    return elements if problem.operator in COPIES else elements * problem.columns


@dataclass(frozen=True)
class Where:
    """For which problems a rule holds; `str` says it in words. A bound of 0 or None does not bind."""

    dtypes: tuple[torch.dtype, ...] = ()
    """All where empty."""
    rows: int = 0
    """At least."""
    columns: int = 0
    """At least."""
    features: int = 0
    """At least."""
    most_features: int | None = None
    most_columns: int | None = None
    most_rows: int | None = None
    most_work: int | None = None
    """groups × rows × columns × features at most, an axis that the operator lacks counting 1."""
    scores_of_a_group: int = 0
    """rows × columns at least."""
    scores: int = 0
    """groups × rows × columns at least."""
    all_rows: int = 0
    """groups × rows at least."""

    def holds(self, problem: Problem) -> bool:
        """Whether a problem is one of these."""
        # A bound that does not bind is not compared: under torch.compile a comparison would guard a dynamic size.
        return (
            (not self.dtypes or problem.dtype in self.dtypes)
            and (not self.rows or problem.rows >= self.rows)
            and (not self.columns or problem.columns >= self.columns)
            and (not self.features or problem.features >= self.features)
            and (self.most_features is None or problem.features <= self.most_features)
            and (self.most_columns is None or problem.columns <= self.most_columns)
            and (self.most_rows is None or problem.rows <= self.most_rows)
            and (self.most_work is None or _extent(problem) <= self.most_work)
            and (not self.scores_of_a_group or problem.rows * problem.columns >= self.scores_of_a_group)
            and (not self.scores or problem.groups * problem.rows * problem.columns >= self.scores)
            and (not self.all_rows or problem.groups * problem.rows >= self.all_rows)
        )

    def __str__(self) -> str:
        bounds = [
            ("rows", self.rows),
            ("columns", self.columns),
            ("features", self.features),
            ("rows × columns", self.scores_of_a_group),
            ("groups × rows × columns", self.scores),
            ("groups × rows", self.all_rows),
        ]
        words = [" or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)] if self.dtypes else []
        words += [f"{name} ≥ {_number(least)}" for name, least in bounds if least]
        limits = [
            ("features", self.most_features),
            ("columns", self.most_columns),
            ("rows", self.most_rows),
            ("groups × rows × columns × features", self.most_work),
        ]
        words += [f"{name} ≤ {_number(most)}" for name, most in limits if most is not None]
        return ", ".join(words) or "always"


def _extent(problem: Problem) -> int:
    size = problem.features
    for length in (problem.rows, problem.columns, problem.groups):
        size *= length if length else 1
    return size


def _number(value: int) -> str:
    power = value.bit_length() - 1
    return f"2^{power}" if value == 2**power and power >= 16 else str(value)


class Rule(NamedTuple):
    """One line of the auto table: on this device this implementation is taken where the condition holds."""

    operator: str
    device: str
    implementation: Impl
    where: Where
    reason: str
    processor: str = ""
    """The processor or GPU whose rows the rule quotes, as `anomem.machine.hardware` names it; "" for any."""

    def holds(self, problem: Problem) -> bool:
        """Whether the rule is of this operator and device, and its condition holds; it may be of another processor."""
        return (self.operator, self.device) == (problem.operator, problem.device) and self.where.holds(problem)

    @property
    def key(self) -> str:
        """Names the rule in `gains.json`."""
        return f"{self.processor}: {self.operator}, {self.where}"

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


_MEASURED = (torch.float32, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_FASTEST = "faster than eager PyTorch and its fused functions, in all committed rows it covers"
_ROWS = "AuthenticAMD family 26 AVX512-BF16"
"""The processor of those rows."""
_ROWS_ZEN4 = "AuthenticAMD family 25 AVX512-BF16"
_ROWS_AMX = "GenuineIntel family 6 AMX"
_MAPS = Where((torch.bfloat16,), rows=2048), Where((torch.float32,), rows=2048, most_features=64)

_STRIDED = Where(_MEASURED, rows=2**16, most_features=64)
_WINOGRAD = Where(_MEASURED, all_rows=1024, columns=32, features=32)
# With AMX: small maps in bfloat16, whose convolution is direct; many channels in float32.
_CONVOLVED_AMX = (
    Where((torch.bfloat16,), all_rows=1024, columns=64, features=64, most_rows=64),
    Where((torch.float32,), rows=16, all_rows=1024, columns=512, features=512),
)


def _beyond_a_gpu(operator: str, bytes_per_score: int) -> Rule:
    """A kernel is taken on every GPU where plain PyTorch exceeds the memory of most.

    Args:
        operator: whose rule.
        bytes_per_score: what plain PyTorch holds at the peak of both passes; counted by tests/stand_in and in
            benchmarks/results/cuda-counts.jsonl.
    """
    return Rule(
        operator,
        "cuda",
        "triton",
        Where(scores=2**33),
        f"plain PyTorch takes {bytes_per_score} bytes a score for both passes, {8 * bytes_per_score} GiB and more, and "
        "the memory of the kernel does not grow with their number (counted, not timed on a GPU yet)",
    )


# A test compares the CPU's rules with the committed rows, forward and backward. `python -m benchmarks.report` writes by
# how much they win into gains.json.
AUTO: tuple[Rule, ...] = (
    Rule("retrieve", "cpu", "native", Where(_MEASURED, rows=1024, columns=64, features=64), _FASTEST, _ROWS),
    Rule("shrink", "cpu", "native", Where(_MEASURED, rows=8192, columns=512, features=64), _FASTEST, _ROWS),
    Rule("nt_xent", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("info_nce", "cpu", "native", Where(_MEASURED, scores_of_a_group=2**20), _FASTEST, _ROWS),
    Rule("gather", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("variance", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("deviation_map", "cpu", "native", Where(_MEASURED, most_features=256), _FASTEST, _ROWS),
    Rule("usage", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule(
        "retrieve",
        "cpu",
        "native",
        # Beyond this work results of 32 MiB and more are mapped anew: how fast depends on the state of the memory.
        Where(_MEASURED, rows=1024, columns=64, features=64, most_features=512, most_columns=512, most_work=2**30),
        _FASTEST,
        _ROWS_ZEN4,
    ),
    Rule("nt_xent", "cpu", "native", Where(_MEASURED, columns=64), _FASTEST, _ROWS_ZEN4),
    Rule("info_nce", "cpu", "native", Where(_MEASURED, scores=2**16), _FASTEST, _ROWS_ZEN4),
    Rule("shrink", "cpu", "native", Where(_MEASURED, rows=8192, columns=512, features=64), _FASTEST, _ROWS_ZEN4),
    Rule("gather", "cpu", "native", Where(_MEASURED, features=128), _FASTEST, _ROWS_ZEN4),
    Rule("variance", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS_ZEN4),
    Rule("deviation_map", "cpu", "native", Where(_MEASURED, most_features=512), _FASTEST, _ROWS_ZEN4),
    Rule("usage", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS_ZEN4),
    *(Rule("batch_norm", "cpu", "native", where, _FASTEST, _ROWS_ZEN4) for where in _MAPS),
    Rule("downsample", "cpu", "native", _STRIDED, _FASTEST, _ROWS_ZEN4),
    Rule("conv3x3", "cpu", "native", _WINOGRAD, _FASTEST, _ROWS_ZEN4),
    # Between: float32 queries of a large memory are measured. With two threads a processor of this family was as fast
    # with the reference (trials, model 207).
    Rule(
        "retrieve",
        "cpu",
        "native",
        Where((torch.float32,), rows=1024, columns=64, features=64, most_columns=1024),
        _FASTEST,
        _ROWS_AMX,
    ),
    Rule("retrieve", "cpu", "native", Where((torch.float32,), rows=3000, columns=64, features=64), _FASTEST, _ROWS_AMX),
    Rule(
        "retrieve", "cpu", "native", Where((torch.bfloat16,), rows=1024, columns=64, features=64), _FASTEST, _ROWS_AMX
    ),
    Rule(
        "retrieve", "cpu", "native", Where((torch.bfloat16,), rows=256, columns=2000, features=128), _FASTEST, _ROWS_AMX
    ),
    Rule("nt_xent", "cpu", "native", Where(_MEASURED, columns=64), _FASTEST, _ROWS_AMX),
    Rule("info_nce", "cpu", "native", Where(_MEASURED, scores=2**16), _FASTEST, _ROWS_AMX),
    Rule("shrink", "cpu", "native", Where(_MEASURED, rows=8192, columns=512, features=64), _FASTEST, _ROWS_AMX),
    Rule("gather", "cpu", "native", Where(_MEASURED, features=128), _FASTEST, _ROWS_AMX),
    Rule("variance", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS_AMX),
    Rule("deviation_map", "cpu", "native", Where(_MEASURED, most_features=512), _FASTEST, _ROWS_AMX),
    Rule("usage", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS_AMX),
    *(Rule("batch_norm", "cpu", "native", where, _FASTEST, _ROWS_AMX) for where in _MAPS),
    Rule("downsample", "cpu", "native", _STRIDED, _FASTEST, _ROWS_AMX),
    *(Rule("conv3x3", "cpu", "native", where, _FASTEST, _ROWS_AMX) for where in _CONVOLVED_AMX),
    _beyond_a_gpu("retrieve", 16),
    _beyond_a_gpu("nt_xent", 21),
    _beyond_a_gpu("info_nce", 21),
)

_TRAFFIC = "plain PyTorch moves 24 to 68 bytes a score, the kernel none (arithmetic, not measured on a GPU yet)"
_LAUNCHES = "bound by memory and launches: a fifth of the launches, at most half the bytes (not measured on a GPU yet)"
_SMALL = "its fixed cost is below that of the reference's many operators (rows: AMD family 25, Intel family 6)"
_SMALL_CALL = Where(_MEASURED, most_features=512, most_columns=512, most_work=2**22)
_ONE_PRODUCT = "no matrix of scores, and one product (benchmarks/results/memories.jsonl; AMD family 25)"
_TWO_PASSES = "two passes over the map each way, with the sum and the ReLU in them (AMD family 25)"
_A_QUARTER = "the gradient of the 1×1 convolution is a quarter of the map (AMD family 25)"
_ONE_PASS = "one pass over an image instead of a dozen over the batch (AMD family 25)"
_WIDENED = "plain PyTorch widens the whole map and narrows its gradient, the kernel reads what was sampled"
_CHUNKS = "scores in chunks of at most 256 MiB, selected from in one pass (not measured on a GPU yet)"
RULES: tuple[Rule, ...] = (
    *(
        Rule(operator, "cpu", "native", _SMALL_CALL, _SMALL)
        for operator in OPERATORS
        if operator not in ("batch_norm", "downsample", "conv3x3")
    ),
    Rule(
        "nt_xent",
        "cpu",
        "native",
        Where(_MEASURED, columns=1024, most_features=256),
        "at least 2.3 times as fast as eager PyTorch on every processor measured (AMD family 26; Intel family 6, AMX)",
    ),
    Rule("gather", "cpu", "native", Where((torch.bfloat16,)), _WIDENED),
    Rule("nearest", "cpu", "native", Where(_MEASURED), _ONE_PRODUCT),
    Rule("read", "cpu", "native", Where(_MEASURED), _ONE_PRODUCT),
    Rule("augment", "cpu", "native", Where(), _ONE_PASS),
    *(Rule("batch_norm", "cpu", "native", where, _TWO_PASSES) for where in _MAPS),
    Rule("downsample", "cpu", "native", _STRIDED, _A_QUARTER),
    Rule("nearest", "cuda", "triton", Where(scores=2**22), _CHUNKS),
    Rule("read", "cuda", "triton", Where(scores=2**22), _CHUNKS),
    Rule("nt_xent", "cuda", "triton", Where(_HALF, most_features=128), _TRAFFIC),
    Rule("info_nce", "cuda", "triton", Where(_HALF, most_features=128), _TRAFFIC),
    Rule("retrieve", "cuda", "triton", Where(_HALF, most_features=128, scores=2**22), _TRAFFIC),
    Rule("gather", "cuda", "native", Where(), _LAUNCHES),
    Rule("variance", "cuda", "native", Where(), _LAUNCHES),
)
"""What is taken where nothing was measured."""
