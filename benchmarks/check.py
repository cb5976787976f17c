"""No time without the right numbers: an implementation is first held to float64 by the budget of `anomem.testing`.

The library's implementations are held to the tests' budget. Others may be less exact (some add a small constant
inside a logarithm, which is their definition): they get a rounding band sixteen times as wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.testing import assert_within_budget, gradients
from benchmarks.case import Case, Function, Implementation
from benchmarks.operators import OPERATORS

ULPS = {True: 4.0, False: 64.0}
_WHOLE = 3e9
"""Up to this many flops the float64 check is done at the case's own size."""


class Wrong(Exception):
    """The numbers are not those of the reference."""


def checked_at(case: Case, compiles: bool) -> Case:
    """The case at the size at which it is checked; what is compiled for one size is checked at that size."""
    operator = OPERATORS[case.operator]
    if compiles and operator.least_work(case).flops <= 20 * _WHOLE:
        return case
    if operator.least_work(case).flops <= _WHOLE:
        return case
    return Case(case.operator, tuple(operator.smaller(case.dims).items()), case.dtype, case.training, case.group)


class Truth:
    """What the reference gives for a case, in its dtype and in float64, computed once for all implementations.

    Args:
        case: at the size of the check.
        device: "cpu" or "cuda".
    """

    def __init__(self, case: Case, device: str) -> None:
        operator = OPERATORS[case.operator]
        self.case = case
        self.inputs = tuple(x.to(device) for x in operator.inputs(case.dims, case.torch_dtype, 7))
        reference = operator.ours("reference")
        self.plain = self._results(reference, self.inputs)
        self.exact = self._results(reference, tuple(x.double() if x.is_floating_point() else x for x in self.inputs))

    def _results(self, function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        if self.case.training:
            return gradients(function, inputs)
        with torch.no_grad():
            return [function(*inputs)]

    def check(self, implementation: Implementation, function: Function) -> None:
        """Hold a function to the truth.

        Raises:
            Wrong: which result is off, by how much.
        """
        actual = self._results(function, self.inputs)
        for i, (mine, theirs, truth) in enumerate(zip(actual, self.plain, self.exact, strict=True)):
            name = f"gradient {i}" if i else "result"
            try:
                assert_within_budget(mine, theirs.to(mine.dtype), truth, name, ULPS[implementation.ours])
            except AssertionError as error:
                raise Wrong(str(error)) from None
