"""torch.compile: one graph for all numbers of a schedule.

torch.export: with "auto" a program of plain PyTorch at any size, with a named implementation its operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError
from anomem.ops import native
from anomem.rules import Impl
from anomem.testing import draw


class Step(nn.Module):
    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.memory = ann.HopfieldMemory(64, 64, impl=impl)
        self.criterion = ann.NTXentLoss(impl=impl)

    def forward(self, z: Tensor, z_pair: Tensor) -> Tensor:
        loss: Tensor = self.criterion(z, self.memory(z_pair))
        return loss


def exported(impl: Impl, strict: bool) -> tuple[Step, torch.export.ExportedProgram]:
    step = Step(impl).eval()
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = ({0: batch}, {0: batch})
    with torch.no_grad():
        return step, torch.export.export(step, (draw(6, 64), draw(6, 64)), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_auto_exports_plain_pytorch_of_every_size(strict: bool) -> None:
    """1500 queries lie beyond the size at which "auto" takes another implementation than at 6."""
    step, program = exported("auto", strict)
    assert "anomem" not in str(program.graph)
    for batch in (2, 1500):
        z, z_pair = draw(batch, 64, seed=1), draw(batch, 64, seed=2)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(z, z_pair), step(z, z_pair))


def test_a_named_implementation_is_kept() -> None:
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    step, program = exported("native", strict=False)
    assert "anomem.native_nt_xent_fwd" in str(program.graph)
    z, z_pair = draw(9, 64, seed=1), draw(9, 64, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(z, z_pair), step(z, z_pair))


POSITIVE = torch.arange(6)
SCHEDULES: dict[str, Callable[[Impl, Tensor, float], Tensor]] = {
    "nt_xent's temperature": lambda impl, x, t: AF.nt_xent(x, x.flip(0), temperature=t, impl=impl),
    "info_nce's temperature": lambda impl, x, t: AF.info_nce(x, x.flip(0), POSITIVE, temperature=t, impl=impl),
    "beta": lambda impl, x, t: AF.hopfield_retrieve(x, x[:4], beta=t, impl=impl),
    "beta of two steps": lambda impl, x, t: AF.hopfield_retrieve(x, x[:4], beta=t, steps=2, impl=impl),
    "shrink": lambda impl, x, t: AF.hopfield_retrieve(x, x[:4], shrink=t, impl=impl),
    "gamma": lambda impl, x, t: AF.variance_hinge(x, gamma=t, impl=impl),
    "eps": lambda impl, x, t: AF.variance_hinge(x, gamma=2.0, eps=t, impl=impl),
}


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_graph_serves_every_number_of_a_schedule(name: str, impl: Impl) -> None:
    """The first number gets a graph of its own.

    The function takes the number as it comes: torch 2.11 compiles arithmetic on a number once per value.
    """
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    function = SCHEDULES[name]
    compiled = torch.compile(lambda x, t: function(impl, x, t), fullgraph=True, backend=graphs)
    for i in range(10):
        leaf = draw(6, 8).requires_grad_()
        results = [one(leaf, 0.05 + 0.02 * i) for one in (compiled, lambda x, t: function(impl, x, t))]
        slopes = [torch.autograd.grad(result.sum(), leaf)[0] for result in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*slopes)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_may_be_a_tensor(name: str, impl: Impl) -> None:
    """A 0-dim tensor gives what its number gives, with both derivatives, and in one compiled graph."""
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    function = SCHEDULES[name]
    compiled = torch.compile(lambda x, t: function(impl, x, t), fullgraph=True, backend=graphs)
    for number in (0.25, 0.125):
        leaf = draw(6, 8).requires_grad_()
        found = []
        for t in (number, torch.tensor(number), torch.tensor(number, dtype=torch.float64)):
            result = function(impl, leaf, t).sum()
            (slope,) = torch.autograd.grad(result, leaf, create_graph=True)
            found.append((result, slope, torch.autograd.grad(slope.square().sum(), leaf)[0]))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])
        torch.testing.assert_close(compiled(leaf, torch.tensor(number)).sum(), found[0][0])
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["shrink", "gamma", "eps"])
def test_a_schedule_that_is_learned_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name}.*without gradient"):
        SCHEDULES[name]("reference", draw(6, 8), torch.tensor(0.1, requires_grad=True))


def test_one_graph_serves_a_temperature_that_is_set() -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    criterion = ann.NTXentLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend=graphs)
    for i in range(10):
        criterion.temperature = 0.5 + 0.04 * i
        torch.testing.assert_close(compiled(draw(6, 8), draw(6, 8, seed=1)), criterion(draw(6, 8), draw(6, 8, seed=1)))
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_a_compiled_energy_gives_the_values_no_gradient(impl: Impl) -> None:
    """None, not zeros: weight decay would move values that the energy does not depend on."""
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    memory = ann.HopfieldMemory(8, 5, value_features=3, impl=impl)
    torch.compile(memory.energy, fullgraph=True, backend="aot_eager")(draw(4, 8)).sum().backward()
    assert memory.values is not None
    assert memory.values.grad is None
    assert memory.prototypes.grad is not None
