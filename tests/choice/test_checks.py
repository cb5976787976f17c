"""A kernel is checked before it is taken: wrong ones are switched off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import backends, choice, machine, measuring, rules
from anomem import functional as AF
from anomem.ops import contrast
from tests.choice.large_call import LARGE, content, kept, new_process


def test_no_memory_for_a_check_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> str:
        raise torch.OutOfMemoryError

    check = measuring.check
    monkeypatch.setattr(measuring, "check", fails)
    assert "no memory" in str(choice.distrust("nt_xent", "native", "cpu", torch.float32, 32))
    monkeypatch.setattr(measuring, "check", check)
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


def test_a_check_does_not_depend_on_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for operator in rules.OPERATORS:
            dtype = torch.uint8 if operator == "augment" else torch.float32
            assert measuring.check(operator, "native", "cpu", dtype, 48) == machine.PASSED, operator
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_large_image_is_checked_on_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """130 images of the call's own size were drawn, also in float64."""
    drawn: list[list[Tensor]] = []
    inputs_of = measuring.inputs_of
    monkeypatch.setattr(measuring, "inputs_of", lambda problem: drawn.append(inputs_of(problem)) or drawn[-1])
    assert choice.distrust("augment", "native", "cpu", torch.uint8, 3 * 1024**2) is None
    assert [list(images.shape) for images, *_ in drawn] == [[8, 3, 64, 64]]


def wrong_by_little(right: Tensor) -> Tensor:
    return right * 1.001


def wrong_in_a_row(right: Tensor) -> Tensor:
    return torch.where(torch.arange(right.shape[-1]) == right.shape[-1] - 1, right + 0.5, right)


def wrong_in_the_gradient(right: Tensor) -> Tensor:
    return right.detach() + 1.01 * (right - right.detach())


def not_a_number(right: Tensor) -> Tensor:
    return right * torch.nan


def of_another_shape(right: Tensor) -> Tensor:
    return right[..., :-1]


def does_not_compile(right: Tensor) -> Tensor:
    raise NotImplementedError("ptxas: no such\n  instruction")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (wrong_by_little, "error 0.001 of the largest magnitude"),
        (wrong_in_a_row, "of the largest magnitude"),
        (wrong_in_the_gradient, "error 0.01 of the largest magnitude"),
        (not_a_number, "error nan"),
        (of_another_shape, "shape"),
        (does_not_compile, "NotImplementedError: ptxas: no such instruction"),
    ],
)
def test_a_wrong_kernel_is_switched_off_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor], words: str, recwarn: pytest.WarningsRecorder
) -> None:
    right, runs = contrast.nt_xent, []

    def planted(*arguments: Any) -> Tensor:
        runs.append(arguments)
        return fault(right(*arguments))

    monkeypatch.setattr(contrast, "nt_xent", planted)
    z = torch.randn(2, 256, 32)
    expected = AF.nt_xent(z, z + 1, impl="reference")
    for _ in range(2):
        assert torch.equal(AF.nt_xent(z, z + 1), expected)
    assert backends.decide(LARGE._replace(rows=1024, columns=1024)).implementation == "reference"
    assert len(runs) == 1  # the check
    (warning,) = [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert "native nt_xent float32 d 32 is switched off" in str(warning.message)
    assert words in str(warning.message)
    checks = content(choice.default_path())["sections"][0]["checks"]
    assert words in checks["native nt_xent float32 d 32"]
    new_process()
    with pytest.warns(RuntimeWarning, match="switched off"):  # remembered, and told in each process
        assert backends.decide(LARGE).implementation == "reference"
    assert len(runs) == 1
    with pytest.warns(RuntimeWarning, match="float32 d 64"):  # another family is checked for itself
        backends.decide(LARGE._replace(features=64))
    assert len(runs) == 2


def test_a_file_does_not_bring_a_wrong_kernel_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept(choice.default_path())
    monkeypatch.setattr(measuring, "check", lambda *_: "wrong")
    with pytest.warns(RuntimeWarning, match="switched off"):
        assert backends.decide(LARGE).implementation == "reference"


def test_hardware_with_committed_rows_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.Rule("usage", "cpu", "native", rules.Where(), "rows", machine.hardware("cpu"))
    monkeypatch.setattr(rules, "AUTO", (rule,))
    monkeypatch.setattr(measuring, "check", lambda *_: pytest.fail("was checked"))
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


def test_an_unchecked_kernel_is_not_taken_where_no_check_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "can_run", lambda device: False)
    reason = choice.distrust("nt_xent", "native", "cpu", torch.float32, 32)
    assert reason is not None
    assert "not checked" in reason
    monkeypatch.undo()
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        *itertools.product(
            (name for name in rules.OPERATORS if name != "augment"), (torch.float32, torch.bfloat16, torch.float64)
        ),
        *itertools.product(("augment",), (torch.float32, torch.uint8)),
    ],
    ids=str,
)
def test_the_kernels_pass_their_check(operator: str, dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert measuring.check(operator, "native", "cpu", dtype, 24) == "passed"
    assert torch.equal(torch.get_rng_state(), state)
