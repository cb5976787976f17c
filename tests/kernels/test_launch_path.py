"""Between a function's call and its kernels nothing waits for the GPU, so that a CUDA graph can capture it.

Here an operator that needs a value on the host is looked for. Graphs are captured on a GPU and, without values, on the
stand-ins of tests/stand_in/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anomem import functional as AF
from anomem.testing import draw, gradients

Case = tuple[Callable[..., Any], list[Tensor]]
POSITIVE, EXCLUDE = torch.arange(5), torch.arange(5) + 1


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Every function with all that it can learn, and its inputs."""

    def rows(*shape: int, seed: int) -> Tensor:
        return draw(*shape, dtype=dtype, seed=seed)

    return {
        "retrieve": (
            lambda q, k, b: AF.hopfield_retrieve(q, k, beta=b, normalize="layer", return_lse=True, impl="triton"),
            [rows(33, 24, seed=1), rows(5, 24, seed=2), torch.tensor(0.5)],
        ),
        "retrieve separate": (
            lambda q, k, v, b: AF.hopfield_retrieve(q, k, values=v, beta=b, return_lse=True, impl="triton"),
            [rows(33, 24, seed=1), rows(5, 24, seed=2), rows(5, 300, seed=3), torch.tensor(0.5)],
        ),
        "nt_xent": (
            lambda a, b, t: AF.nt_xent(a, b, temperature=t, reduction="none", impl="triton"),
            [rows(2, 5, 24, seed=1), rows(2, 5, 24, seed=2), torch.tensor(0.2)],
        ),
        "info_nce": (
            lambda a, b, p, e, t: AF.info_nce(a, b, p, e, temperature=t, reduction="none", impl="triton"),
            [rows(2, 5, 24, seed=1), rows(2, 9, 24, seed=2), POSITIVE, EXCLUDE, torch.tensor(0.2)],
        ),
    }


NAMES = list(cases(torch.float32))


class Operators(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


# What needs a value or a count on the host. `_to_copy` is a cast of dtype, or a copy between devices.
WAITS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_launching_reads_no_value(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels' own Python calls, seen from inside their operators."""
    from anomem import kernels

    recorded: dict[str, Operators] = {}

    def watched(operator: str) -> None:
        run, (module, function, _) = kernels.implementation(operator), kernels.OPERATORS[operator]

        def watch(*args: Any) -> Any:
            with recorded.setdefault(operator, Operators()):
                return run(*args)

        monkeypatch.setattr(f"anomem.kernels.{module}.{function}", watch)

    for operator in kernels.OPERATORS:
        watched(operator)
    gradients(*cases(dtype)[name])
    word = name.partition(" ")[0]
    assert set(recorded) == {f"anomem::triton_{word}_fwd", f"anomem::triton_{word}_bwd"}
    for operators in recorded.values():
        assert operators.names
        assert not operators.names & WAITS


@pytest.mark.parametrize("name", NAMES)
def test_from_a_call_to_its_operators_no_value_is_read(name: str) -> None:
    """On fake tensors, which have no values to read."""
    function, inputs = cases(torch.float32)[name]
    with FakeTensorMode():
        leaves = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        floating = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        slopes = torch.autograd.grad(outputs, floating, [torch.empty_like(x) for x in outputs])
        assert [x.shape for x in slopes] == [x.shape for x in floating]


def test_a_value_that_is_read_is_seen() -> None:
    with Operators() as operators:
        bool(torch.ones(()) > 0)
    assert operators.names & WAITS
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(()).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_call_goes_around_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode and a profiler see the operators. A plain call runs Triton's functions, with the same result."""
    word = name.partition(" ")[0]
    names = {f"anomem::triton_{word}_fwd", f"anomem::triton_{word}_bwd"}
    with Operators() as operators:
        seen = gradients(*cases(torch.float32)[name])
    assert operators.names >= names
    with torch.profiler.profile() as profile:
        gradients(*cases(torch.float32)[name])
    assert {event.key for event in profile.key_averages()} >= names
    monkeypatch.setattr("anomem.ops.library.operator", lambda name, backend: pytest.fail(f"{backend}_{name}"))
    for mine, other in zip(gradients(*cases(torch.float32)[name]), seen, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    function, inputs = cases(dtype)[name]
    inputs = [x.cuda() for x in inputs]
    others = [x.flip(0) if x.dim() > 1 else x for x in inputs]
    floating = [x.requires_grad_() for x in inputs if x.is_floating_point()]

    def step() -> list[Tensor]:
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        slopes = torch.autograd.grad(outputs, floating, [torch.ones_like(x) for x in outputs])
        return [*(out.detach() for out in outputs), *slopes]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        assert torch.equal(replayed, fresh)
