"""How the results of a kernel are compared with float64, shared by tests and benchmarks.

The rule (`assert_within_budget`): against float64, a kernel may err at most twice as much as plain PyTorch does in
the same dtype, plus a band of a few units in the last place for how the result itself is rounded. No tolerance is
written by hand. Inputs are drawn in the low dtype and promoted, so both see the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that are exactly representable in `dtype`.

    Args:
        shape: of the result.
        dtype: of the result.
        seed: of an own generator.
        scale: standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, measured in the largest magnitude of the exact result (1 if that is zero)."""
    if exact.numel() == 0:
        return 0.0
    unit = float(exact.abs().max()) or 1.0
    return float((actual.double() - exact).abs().max()) / unit


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result", ulps: float = 4.0) -> None:
    """Hold a kernel's result to twice plain PyTorch's error plus a rounding band.

    Args:
        actual: what the kernel gave.
        plain: the reference in the same dtype; in float32 for a float64 kernel.
        exact: the reference in float64.
        name: for the message.
        ulps: width of the band, in units in the last place of the largest magnitude.

    Raises:
        AssertionError: wrong shape or dtype, a non-finite value where the exact one is finite or the reverse, or an
            error beyond the budget.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    in_float64 = actual.dtype == torch.float64 and plain.dtype == torch.float32
    assert in_float64 or actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite().cpu(), finite.cpu()), f"{name}: finite where it should not be, or the reverse"
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    truth = torch.where(finite, exact, zero)
    actual_error, plain_error = (error(torch.where(finite, x.double(), zero), truth) for x in (actual, plain))
    unit = torch.finfo(actual.dtype).eps
    plain_error *= unit / torch.finfo(plain.dtype).eps
    budget = (3 if in_float64 else 2) * plain_error + ulps * unit
    if "PYTEST_CURRENT_TEST" in os.environ:  # pytest shows it under -s
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].removesuffix(" (call)")
        ratio = f"{actual_error / plain_error:.2f}x plain" if plain_error else f"{actual_error / unit:.2f} ulps"
        print(f"{test}: {name}: error {ratio}")
    assert actual_error <= budget, (
        f"{name}: error {actual_error:.3g} of the largest magnitude, budget {budget:.3g} (plain {plain_error:.3g})"
    )


def gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs and gradients of a function under fixed upstream gradients.

    Args:
        function: differentiable in every input that is a floating tensor.
        inputs: leaves; copies are made.

    Returns:
        The outputs, then one gradient per floating input.
    """
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    upstream = [draw(*out.shape, seed=17 + i).to(out) for i, out in enumerate(outputs)]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, upstream)]


def compare(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    ulps: float = 4.0,
) -> None:
    """Forward and backward of a kernel against the reference, by the budget.

    Args:
        kernel: the function under test.
        reference: the specification; run in the inputs' dtype and in float64.
        inputs: tensors (None and integer tensors are passed through). Those in float64 are rounded to float32 numbers
            first, so that the float32 reference sees the same.
        ulps: of `assert_within_budget`.
    """

    def converted(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]

    in_float64 = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs)
    if in_float64:
        inputs = converted(torch.float64, converted(torch.float32, inputs))
    actual = gradients(kernel, inputs)
    plain = gradients(reference, converted(torch.float32, inputs) if in_float64 else inputs)
    exact = gradients(reference, converted(torch.float64, inputs))
    assert len(actual) == len(exact), f"{len(actual)} results, expected {len(exact)}"
    for i, (result, baseline, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(result, baseline if in_float64 else baseline.to(result.dtype), truth, f"result {i}", ulps)
