"""What every implementation of every operator is held to; the file of an operator adds what it alone promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from anomem import backends
from anomem.errors import ArgumentError
from anomem.rules import Impl
from anomem.testing import assert_within_budget, compare, draw, gradients

Function = Callable[..., Any]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Implementation(NamedTuple):
    """One way to compute an operator, as a parameter of a test."""

    label: str
    """In the test's name."""
    name: Impl
    """What `impl=` is given."""
    dtypes: tuple[torch.dtype, ...]
    """That it takes; the others it refuses."""
    allow_tf32: bool = False
    """Whether float32 takes the scheme of TF32 products; the tests leave their rounding out."""


REFERENCE = Implementation("reference", "reference", (F32, BF16, F16, F64))
NATIVE = Implementation("native", "native", (F32, BF16, F64))
TRITON = Implementation("triton", "triton", (F32, BF16, F16))
# Retrieval of float32 rows takes the chunked scheme where products are exact and the flash scheme where they are TF32;
# shorter floats do not see the difference.
TRITON_TF32 = Implementation("triton-tf32", "triton", (F32,), allow_tf32=True)


def fault(reason: str, *values: Any, raises: type[Exception] = AssertionError) -> Any:
    """A row of `cases` at which an implementation breaks the contract, and why. Once mended the test fails."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, raises=raises, reason=reason))


def _label(value: Any) -> str:
    """A value in a test's name: the same in every process, which the address of a function is not."""
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


def cases(names: str, table: Mapping[Implementation, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrises a test by implementation, each with inputs that it can take.

    Args:
        names: of the arguments after `impl`, as for `pytest.mark.parametrize`.
        table: for each implementation its rows of values; a row from `fault` is expected to fail.
    """
    parameters = []
    for implementation, rows in table.items():
        # Padding is computed and masked: the interpreter's numpy may overflow where no result does.
        quiet = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if implementation.name == "triton" else []
        for row in rows:
            values, marks = (row.values, row.marks) if isinstance(row, ParameterSet) else (row, ())
            label = "-".join([implementation.label, *(_label(value) for value in values)])
            marked = [*quiet, *marks]
            parameters.append(pytest.param(implementation, *values, id=label.replace(" ", ""), marks=marked))
    wanted = ", ".join(["impl", names] if names else ["impl"])
    return pytest.mark.parametrize(wanted if names else "impl", parameters, indirect=["impl"])


def each(*implementations: Implementation) -> pytest.MarkDecorator:
    """Parametrises a test by implementation alone."""
    return cases("", {implementation: [()] for implementation in implementations})


def each_dtype(*implementations: Implementation, among: Sequence[torch.dtype] = (F32, BF16, F16)) -> Any:
    """Parametrises a test by implementation and the dtypes that it takes."""
    return cases(
        "dtype",
        {one: [(dtype,) for dtype in one.dtypes if dtype in among] for one in implementations},
    )


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def assert_same_values(first: Sequence[Tensor], second: Sequence[Tensor], impl: Impl) -> None:
    """The same bits from a kernel; close ones from plain PyTorch, whose products depend on strides and batches."""
    for one, other in zip(first, second, strict=True):
        if impl == "reference":
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def compare_values(function: Function, impl: Impl, inputs: Sequence[Tensor | None]) -> None:
    """Every result of a function without gradients by the budget, integers exactly.

    Args:
        function: of `impl` and the inputs.
        impl: under test.
        inputs: those in float64 are rounded to float32 numbers, which the float32 reference sees.
    """

    def converted(dtype: torch.dtype) -> list[Tensor | None]:
        return [None if x is None else x.to(dtype) for x in inputs]

    wide = any(x is not None and x.dtype == F64 for x in inputs)
    narrow = converted(F32) if wide else list(inputs)
    actual, plain, exact = (
        tuple_of(function(name, *tensors))
        for name, tensors in (
            (impl, [None if x is None else x.to(F64) for x in narrow] if wide else inputs),
            ("reference", narrow),
            ("reference", [None if x is None else x.to(F64) for x in narrow]),
        )
    )
    for i, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        if mine.is_floating_point():
            assert_within_budget(mine, theirs, truth, f"result {i}")
        else:
            assert torch.equal(mine, truth)


def gradients_by_differences(function: Function, inputs: Sequence[Tensor], step: float = 1e-5) -> list[Tensor]:
    """Outputs and gradients as `anomem.testing.gradients` gives them, from values of the function alone, in float64."""
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    outputs = tuple_of(function(*inputs))
    upstream = [draw(*out.shape, seed=17 + i).to(out) for i, out in enumerate(outputs)]

    def value() -> float:
        return sum(float((out * g).sum()) for out, g in zip(tuple_of(function(*inputs)), upstream, strict=True))

    slopes = []
    for x in (x for x in inputs if x.is_floating_point()):
        slope, numbers = torch.empty(x.numel(), dtype=F64), x.view(-1)
        for i, number in enumerate(numbers.tolist()):
            numbers[i] = number + step
            above = value()
            numbers[i] = number - step
            slope[i] = (above - value()) / (2 * step)
            numbers[i] = number
        slopes.append(slope.view(x.shape))
    return [*outputs, *slopes]


def of_the_operator(test: Function) -> Function:
    """Marks a test that is the same for all schemes of an implementation: it runs for the first of each name."""
    test.of_the_operator = True  # type: ignore[attr-defined]
    return test


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
    "every second row": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "first two axes exchanged": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
}

LEAST_AXES = {"first two axes exchanged": 3, "channels last": 4}


class Contract:
    """The tests of one operator for each of its implementations; a subclass says how it is called."""

    implementations: ClassVar[tuple[Implementation, ...]]
    no_rows_fail: ClassVar[dict[tuple[Implementation, torch.dtype], str]] = {}
    """Where a call without rows raises RuntimeError though it must not, and why."""
    differentiable: ClassVar[bool] = True
    mapped: ClassVar[bool] = True
    """Whether the operator takes part in torch.func.vmap."""
    cast: ClassVar[bool] = True
    """Whether torch.autocast casts the inputs, as for a matrix product; what only copies or adds is left alone."""
    own_products: ClassVar[bool] = True
    """Whether no product is torch's, the last bits of which depend on the number of rows."""
    branches: ClassVar[bool] = False
    """Whether plain PyTorch takes branches by the numbers in its inputs, outside of a trace."""
    sizes: ClassVar[tuple[int, ...]] = (0, 1, 17)
    """Numbers of rows that must work, none and one among them."""
    many: ClassVar[int] = 33
    """A number of rows that takes several blocks."""

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        """Tensors of at least two axes, floating ones first."""
        raise NotImplementedError

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        """Learned numbers, which `call` takes after the inputs."""
        return []

    def call(self, impl: Impl, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError

    def plain(self, impl: Impl, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        """What the error of an implementation is measured in."""
        return self.call("reference", *inputs)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Operators with arguments, for opcheck: forward and backward."""
        raise NotImplementedError

    def results(self, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs and, where there are any, gradients."""
        return gradients(function, inputs) if self.differentiable else list(tuple_of(function(*inputs)))

    def function(self, impl: Impl) -> Function:
        return lambda *inputs: self.call(impl, *inputs)

    def test_it_runs_where_the_contract_says(self) -> None:
        """An implementation that no test here holds to the contract refuses the call, and refuses other dtypes."""
        known = {(one.name, dtype) for one in self.implementations for dtype in one.dtypes}
        names: tuple[Impl, ...] = ("reference", "native", "triton")
        for name in names:
            for dtype in REFERENCE.dtypes:
                if (name, dtype) not in known:
                    with pytest.raises(ArgumentError, match=rf"impl.*(not {str(dtype)[6:]}|no Triton kernel)"):
                        self.call(name, *self.inputs(4, dtype))

    def hold_to_budget(self, impl: Impl, inputs: Sequence[Tensor]) -> None:
        if self.differentiable:
            compare(self.function(impl), lambda *x: self.plain(impl, *x), inputs)
        else:
            compare_values(self.call, impl, inputs)

    def test_no_rows(self, impl: Impl, dtype: torch.dtype) -> None:
        """A result of nothing has its shape, and the other inputs a gradient of zeros."""
        if 0 in self.sizes:
            self.hold_to_budget(impl, self.inputs(0, dtype))

    def test_few_rows_are_within_budget(self, impl: Impl, dtype: torch.dtype) -> None:
        for rows in self.sizes:
            if rows > 0:
                self.hold_to_budget(impl, self.inputs(rows, dtype))

    def test_two_runs_give_the_same_bits(self, impl: Impl, dtype: torch.dtype) -> None:
        inputs = [*self.inputs(self.many, dtype), *self.parameters(dtype)]
        first, second = (self.results(self.function(impl), inputs) for _ in range(2))
        assert_same_bits(first, second)

    def test_gradients_are_slopes(self, impl: Impl) -> None:
        """Against central differences of the reference in float64, whose own derivatives take no part."""
        if not self.differentiable:
            return
        inputs = self.inputs(5)
        actual, plain = (gradients(self.function(name), inputs) for name in (impl, "reference"))
        exact = gradients_by_differences(self.function("reference"), inputs)
        for i, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
            assert_within_budget(mine, theirs, truth, f"result {i}")

    def test_first_and_second_derivatives(self, impl: Impl) -> None:
        """By finite differences where there is float64; by the budget of the second derivative where there is none."""
        if not self.differentiable:
            return
        if impl == "triton":

            def slopes(name: Impl) -> Function:
                def run(*leaves: Tensor) -> tuple[Tensor, ...]:
                    total = sum(out.square().sum() for out in tuple_of(self.call(name, *leaves)))
                    wanted = [x for x in leaves if x.is_floating_point()]
                    return torch.autograd.grad(total, wanted, create_graph=True)

                return run

            compare(slopes(impl), slopes("reference"), [*self.inputs(5), *self.parameters()])
            return
        leaves = [*self.inputs(4, F64), *self.parameters(F64)]
        leaves = [x.requires_grad_() if x.is_floating_point() else x for x in leaves]
        assert torch.autograd.gradcheck(self.function(impl), leaves)
        assert torch.autograd.gradgradcheck(self.function(impl), leaves)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_gives_the_same_bits(self, impl: Impl, layout: str) -> None:
        """Of results and gradients; NaN beside the rows is not read."""

        def laid_out(x: Tensor) -> Tensor:
            return LAYOUTS[layout](x) if x.is_floating_point() else x

        inputs = self.inputs(9)
        if inputs[0].dim() < LEAST_AXES.get(layout, 2):
            return  # another layout, or none, for matrices
        actual = self.function(impl)
        strided = lambda *x: actual(*(laid_out(one) for one in x))  # noqa: E731
        compact = lambda *x: actual(*(laid_out(one).contiguous() for one in x))  # noqa: E731
        first, second = (self.results(function, inputs) for function in (strided, compact))
        assert_same_values(first, second, impl)

    @of_the_operator
    def test_autocast(self, impl: Impl) -> None:
        """The bits of a call in the lower dtype, or, of what autocast leaves alone, of the call without it."""
        inputs = self.inputs(6)
        with torch.autocast("cpu", dtype=BF16):
            got = tuple_of(self.call(impl, *inputs))
        given = [x.bfloat16() if self.cast and x.is_floating_point() else x for x in inputs]
        expected = tuple_of(self.call(impl, *given))
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        assert_same_bits(got, expected)

    @of_the_operator
    def test_operators_keep_their_schemas(self, impl: Impl) -> None:
        if impl == "reference":
            return
        self.call(impl, *self.inputs(4))  # registers the operators
        for operator, arguments in self.operator_calls(impl):
            torch.library.opcheck(operator.default, arguments)

    @of_the_operator
    def test_one_graph_serves_any_number_of_rows(self, impl: Impl) -> None:
        """`fullgraph=True`, both passes, with the bits of the uncompiled ones."""
        torch.compiler.reset()
        function = self.function(impl)
        backend = "eager" if impl == "reference" else "aot_eager"  # plain PyTorch's own operators are not on trial
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
        for rows in (4, 7, 30):
            inputs = [*self.inputs(rows), *self.parameters()]
            got, expected = (self.results(one, inputs) for one in (compiled, function))
            assert_same_values(got, expected, impl)

    @of_the_operator
    def test_a_compiled_gradient(self, impl: Impl) -> None:
        """torch.func.grad in a compiled function, where the compiler knows its argument as it was before it."""
        if not self.differentiable or impl != "native":
            return
        torch.compiler.reset()
        x, *rest = self.inputs(4)

        def gradient(x: Tensor) -> Tensor:
            def loss(x: Tensor) -> Tensor:
                outputs = tuple_of(self.call(impl, x, *rest))
                return sum((y.sin().sum() for y in outputs if y.is_floating_point()), x.new_zeros(()))

            found: Tensor = torch.func.grad(loss)(x)
            return found

        compiled = torch.compile(gradient, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), gradient(x))

    @of_the_operator
    def test_an_exported_program_keeps_the_named_implementation(self, impl: Impl) -> None:
        contract = self

        class Module(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Any:
                return contract.call(impl, *inputs)

        module, inputs = Module(), tuple(self.inputs(6))
        with torch.no_grad():
            program = torch.export.export(module, inputs, strict=False)
            assert (f"anomem.{impl}_" in str(program.graph)) == (impl != "reference")
            assert_same_bits(tuple_of(program.module()(*inputs)), tuple_of(module(*inputs)))

    @of_the_operator
    def test_forward_mode(self, impl: Impl) -> None:
        """Runs through the reference, which "auto" takes; a named kernel refuses."""
        if not self.differentiable:
            return
        inputs = [x for x in self.inputs(4) if x.is_floating_point()]
        rest = self.inputs(4)[len(inputs) :]
        tangents = [draw(*x.shape, seed=9) for x in inputs]

        def jvp(name: Impl) -> Any:
            return torch.func.jvp(lambda *x: self.call(name, *x, *rest), tuple(inputs), tuple(tangents))

        if impl != "reference":
            with pytest.raises(ArgumentError, match="forward-mode differentiation"):
                jvp(impl)
            return
        for mine, theirs in zip(jvp("auto"), jvp("reference"), strict=True):
            torch.testing.assert_close(mine, theirs)

    @of_the_operator
    def test_a_jacobian_in_reverse_mode(self, impl: Impl) -> None:
        """jacrev runs the backward after the level at which its inputs required a gradient has closed."""
        if not self.differentiable:
            return
        x, *rest = self.inputs(4, F32 if impl == "triton" else F64)

        def jacobian(name: Impl, first: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple_of(torch.func.jacrev(lambda x: self.call(name, x, *others))(first))

        for mine, theirs in zip(jacobian(impl, x, rest), jacobian("reference", x, rest), strict=True):
            torch.testing.assert_close(mine, theirs)

    @of_the_operator
    def test_forward_mode_over_a_backward(self, impl: Impl) -> None:
        """A tangent of the upstream gradient reaches the gradient; the kernels alone would drop it without a word."""
        if not self.differentiable:
            return
        x, *rest = self.inputs(4, F32 if impl == "triton" else F64)
        x.requires_grad_()
        tangents = []
        for name in (impl, "reference"):
            outputs = tuple_of(self.call(name, x, *rest))
            with forward_ad.dual_level():
                upstream = [
                    forward_ad.make_dual(torch.ones_like(out), draw(*out.shape, seed=2).to(out)) for out in outputs
                ]
                (gradient,) = torch.autograd.grad(outputs, x, upstream)
                tangents.append(forward_ad.unpack_dual(gradient).tangent)
        assert tangents[0] is not None
        torch.testing.assert_close(*tangents)

    def test_saved_tensors_may_come_back_in_another_layout(self, impl: Impl) -> None:
        """A saved-tensors hook gives back the same numbers with other strides; gradients keep their bits."""
        if not self.differentiable:
            return
        inputs = [*self.inputs(6), *self.parameters()]
        expected = self.results(self.function(impl), inputs)

        def other_strides(x: Tensor) -> Tensor:
            return x if x.dim() < 2 else x.mT.contiguous().mT

        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, other_strides):
            got = self.results(self.function(impl), inputs)
        assert_same_values(got, expected, impl)

    @of_the_operator
    def test_a_batch_of_upstream_gradients(self, impl: Impl) -> None:
        """`is_grads_batched=True`, as in `torch.autograd.functional.jacobian(vectorize=True)`."""
        if not self.differentiable:
            return
        leaves = [x.requires_grad_() if x.is_floating_point() else x for x in self.inputs(4)]
        wanted = [x for x in leaves if x.requires_grad]
        first = tuple_of(self.call(impl, *leaves))[0]
        upstream = torch.stack([draw(*first.shape, seed=seed).to(first) for seed in (1, 2)])

        def gradients_of(grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
            outputs = tuple_of(self.call(impl, *leaves))[0]
            return torch.autograd.grad(outputs, wanted, grad, allow_unused=True, **options)

        expected = zip(*(gradients_of(one) for one in upstream), strict=True)
        for several, each_alone in zip(gradients_of(upstream, is_grads_batched=True), expected, strict=True):
            assert (several is None) == (each_alone[0] is None)
            if several is not None:
                torch.testing.assert_close(several, torch.stack(each_alone), rtol=1e-4, atol=1e-5)

    @of_the_operator
    def test_tracing_reads_no_values(self, impl: Impl) -> None:
        inputs = self.inputs(4)
        with torch.no_grad():
            traced = make_fx(self.function(impl))(*inputs)
            assert_same_bits(tuple_of(traced(*inputs)), tuple_of(self.call(impl, *inputs)))
        if impl == "reference" and self.differentiable:
            first, *rest = inputs
            outputs, _ = torch.func.linearize(lambda x: self.call("auto", x, *rest), first)
            torch.testing.assert_close(tuple_of(outputs), tuple_of(self.call(impl, *inputs)))

    @of_the_operator
    def test_fake_tensors_outside_of_their_mode(self, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
        """They give results of the right shapes, and the choice is told that there are no numbers to measure with."""
        if impl == "reference" and self.branches:
            return
        told: list[bool] = []
        choose = backends.choose
        spy = lambda problem, *a, **options: told.append(problem.fake) or choose(problem, *a, **options)  # noqa: E731
        monkeypatch.setattr(backends, "choose", spy)
        inputs = self.inputs(6)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad():
            expected = tuple_of(self.call(impl, *inputs))
            assert not any(told)
            told.clear()
            got = tuple_of(self.call(impl, *(mode.from_tensor(x) for x in inputs)))
        assert told == [True]
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]

    @of_the_operator
    def test_second_derivatives_in_every_mode(self, impl: Impl) -> None:
        """Forward mode runs through the reference, which "auto" takes."""
        if not self.differentiable or impl != "reference":
            return
        x, *rest = self.inputs(2, F64)

        def total(x: Tensor) -> Tensor:
            return torch.stack([out.pow(3).sum() for out in tuple_of(self.call("auto", x, *rest))]).sum()

        jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
        expected = jacrev(jacrev(total))(x)
        for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
            torch.testing.assert_close(outer(inner(total))(x), expected)

    @of_the_operator
    def test_vmap(self, impl: Impl) -> None:
        """Over the first input, and over all of them."""
        if not self.mapped:
            return
        calls = [self.inputs(6) for _ in range(3)]
        for i, call in enumerate(calls):
            for j, x in enumerate(call):
                if x.is_floating_point():
                    call[j] = draw(*x.shape, seed=10 * i + j)
        stacked = torch.stack([call[0] for call in calls])
        rest, index = calls[0][1:], [x for x in calls[0] if not x.is_floating_point()]
        floating = [torch.stack(same) for same in zip(*calls, strict=True) if same[0].is_floating_point()]
        shared = tuple_of(torch.func.vmap(lambda x: self.call(impl, x, *rest))(stacked))
        own = tuple_of(torch.func.vmap(lambda *x: self.call(impl, *x, *index))(*floating))
        for mapped, inputs in ((shared, [[call[0], *rest] for call in calls]), (own, calls)):
            each_alone = zip(*(tuple_of(self.call(impl, *x)) for x in inputs), strict=True)
            expected = [torch.stack(results) for results in each_alone]
            assert_same_values(mapped, expected, impl if self.own_products else "reference")
