"""Times and checks the implementations of an operator.

`measure` times both passes of the reference and of kernels, in turns until the times separate. `check` compares a
kernel with float64. Both draw inputs of their own with generators of their own: they change no random state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem import machine, obstacles, reference, rules, testing
from anomem.machine import Measured
from anomem.ops import augment as augments
from anomem.ops import batch_norm as batch_norms
from anomem.ops import contrast, retrieve, sampling
from anomem.ops import conv3x3 as convolutions
from anomem.ops import deviation_map as deviation_maps
from anomem.ops import downsample as downsamples
from anomem.ops import nearest as nearests
from anomem.ops import read as reads
from anomem.ops import usage as usages
from anomem.ops.library import Memory, accumulator
from anomem.rules import Problem

Function = Callable[..., tuple[Tensor, ...]]
SDPA = "SDPA"
"""A rival of retrieval that is measured by the command, and no implementation: `auto` cannot take it."""
_MOST_WORK, _MOST_COPIED, _MOST_CONVOLVED = 2**27, 2**24, 2**29
"""Larger calls are measured on a part: multiplications, numbers of operators that only copy, multiplications of a
convolution."""
_ENOUGH_ROWS, _LEAST = 1024, 256
"""Rows are halved down to the first number before columns are: what a call does once, as the sums of a memory's
gradient, weighs more beside few rows. No part has fewer rows or columns than the second."""
_TOP_K = 16
"""Prototypes of a measured read."""
_MARGIN = 1.05
"""A kernel is taken if the reference takes so many times as long."""
_TIE = 1.1
"""Times up to so many times the least are a tie: whichever is taken costs little, and a choice between them is kept."""
_ROUNDS, _ENOUGH_ROUNDS, _ENOUGH_SECONDS = 3, 15, 0.02
"""The fewest rounds; short calls take more of them, so that one disturbance of the machine does not decide."""
_SECONDS = 0.25
"""After so long no new round begins if there were enough."""
_MOST_SECONDS = 1.0
"""After so long none begins at all: the machine is busy."""


def measure(problem: Problem, training: bool, kernels: Sequence[str], rivals: bool = False) -> Measured | None:
    """Time the reference and kernels on random inputs of a call's sizes, of a bounded part where it is large.

    Args:
        problem: the call.
        training: both passes, or the forward pass alone.
        kernels: names of implementations that can run it.
        rivals: also time SDPA for a retrieval.

    Returns:
        The fastest implementation; the reference unless a kernel is ahead by a margin. None if nothing runs.
    """
    problem = bounded(problem)
    inputs = inputs_of(problem)
    functions = {name: function(problem.operator, name) for name in ("reference", *kernels)}
    if rivals and problem.operator == "retrieve":
        functions[SDPA] = _sdpa
    calls: dict[str, Callable[[], object]] = {}
    seconds: dict[str, list[float]] = {}
    for name, one in functions.items():
        outputs = 2 if problem.operator == "downsample" else 1
        call = _both_passes(one, inputs, outputs) if training else partial(_forward, one, inputs)
        try:
            for _ in range(2):  # the first compiles, allocates and starts threads
                _timed(call, problem.device)
        except Exception:  # out of memory, or whatever a compiler, a driver or a launch raises at this size
            continue
        calls[name], seconds[name] = call, []
    if not calls:
        return None
    begin = time.perf_counter()
    while not _done(seconds, time.perf_counter() - begin):
        for name, call in calls.items():
            seconds[name].append(_timed(call, problem.device))
    times = {name: 1e3 * median(values) for name, values in seconds.items()}
    best = min((name for name in times if name != SDPA), key=times.__getitem__)
    if "reference" in times and times["reference"] < _MARGIN * times[best]:
        best = "reference"
    return Measured(best, times, _separate(seconds, _TIE))


def check(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str:
    """Compare a kernel with float64 on a small problem, forward and backward.

    Args:
        operator: a name of `anomem.rules.OPERATORS`.
        implementation: "native" or "triton".
        device: "cpu" or "cuda".
        dtype: of the inputs.
        features: length of a row.

    Returns:
        "passed", or what came and what was expected.
    """
    why_not = obstacles.obstacle(operator, implementation, device, dtype, features)  # loads the library
    if why_not is not None:
        return why_not
    # Ragged: several tiles of each axis, none of them full.
    problem = Problem(operator, device, dtype, features, rows=130, columns=130 if operator == "nt_xent" else 70)
    problem = problem._replace(groups=20 if operator == "gather" else 2 if operator not in _ONE_GROUP else 1)
    if operator == "gather":
        problem = problem._replace(rows=8)
    if operator == "augment":  # a large image is no other case, and its reference takes seconds
        problem = problem._replace(rows=8, features=min(features, _MOST_NUMBERS))
    inputs = inputs_of(problem)
    try:
        actual = _results(function(operator, implementation), inputs, operator)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a driver or a launch raises: the kernel does not run here
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    outputs = len(actual) if operator in rules.INFERENCE else len(actual) - sum(x.is_floating_point() for x in inputs)
    plain_dtype = dtype if dtype.is_floating_point and dtype != torch.float64 else torch.float32
    plain = _results(function(operator, "reference"), _converted(inputs, plain_dtype), operator)
    exact = _results(function(operator, "reference"), _converted(inputs, torch.float64), operator)
    for i, (result, baseline, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        what = f"result {i}" if i < outputs else f"gradient {i - outputs}"
        if result.shape != truth.shape:
            return f"{what}: shape {list(result.shape)}, expected {list(truth.shape)}"
        came = testing.error(result, truth) if bool(result.isfinite().all()) else float("nan")
        unit = torch.finfo(result.dtype).eps
        plain_error = testing.error(baseline, truth) * unit / torch.finfo(baseline.dtype).eps
        # Twice the budget of the tests: this looks for broken kernels, on numbers that no test has seen.
        budget = 4 * plain_error + 8 * unit
        if not came <= budget:
            return f"{what}: error {came:.3g} of the largest magnitude against float64, expected at most {budget:.3g}"
    return machine.PASSED


_MOST_NUMBERS = 3 * 64 * 64
"""Of a checked image."""
_ONE_GROUP = ("retrieve", "shrink", *rules.INFERENCE)


def bounded(problem: Problem) -> Problem:
    """The same problem with fewer groups, rows and then columns where it is too large to be timed in milliseconds."""
    most = _MOST_COPIED if problem.operator in rules.COPIES else _MOST_WORK
    taps = 1
    if problem.operator == "conv3x3":  # of few images most of the time is the weight's
        most, taps = _MOST_CONVOLVED, 9

    def size(problem: Problem) -> int:
        if problem.operator == "gather":
            return problem.rows * problem.columns * problem.features  # the map, whose gradient is written
        if problem.operator == "downsample":  # as many as the map of 16 channels whose convolutions take as long
            return problem.rows * problem.features**2 // 16
        return rules.work(problem) * taps

    while size(problem) > most:
        tied = problem.operator == "nt_xent"
        if problem.groups > 1 and problem.operator != "gather":
            problem = problem._replace(groups=(problem.groups + 1) // 2)
        elif problem.rows > (_LEAST if tied else _ENOUGH_ROWS) and (tied or problem.rows >= problem.columns // 16):
            half = (problem.rows + 3) // 4 * 2
            problem = problem._replace(rows=half, columns=half if tied else problem.columns)
        elif problem.columns > _LEAST and not tied:
            problem = problem._replace(columns=(problem.columns + 1) // 2)
        elif problem.rows > 2 and not tied:
            problem = problem._replace(rows=(problem.rows + 1) // 2)
        else:
            break
    return problem


def inputs_of(problem: Problem) -> list[Tensor]:
    """Random inputs of an operator; integer tensors among them are indices."""
    operator, device, dtype, d, rows, columns, groups, *_ = problem
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def indices(count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=device)

    if operator == "nt_xent":
        return [draw(groups, max(rows // 2, 1), d), draw(groups, max(rows // 2, 1), d)]
    if operator == "info_nce":
        return [draw(groups, rows, d), draw(groups, columns, d), indices(rows, columns)]
    if operator == "gather":
        return [draw(rows, d, columns, 1), indices(groups, columns)]
    if operator == "variance":
        return [draw(groups, rows, d)]
    if operator == "batch_norm":
        maps = [draw(1, d, rows, 1).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        return [*maps, draw(d), draw(d)]
    if operator == "downsample":
        side = min(16, math.isqrt(rows))
        feature_map = draw(max(1, rows // side**2), d, side, side).contiguous(memory_format=torch.channels_last)
        return [feature_map, draw(d, d, 3, 3), draw(d, d, 1, 1)]
    if operator == "conv3x3":
        side = max(1, math.isqrt(rows))
        feature_map = draw(groups, d, side, side).contiguous(memory_format=torch.channels_last)
        return [feature_map, draw(columns, d, 3, 3).contiguous(memory_format=torch.channels_last)]
    if operator == "deviation_map":
        return [draw(1, d, rows, 1), draw(columns, d)]
    if operator == "augment":
        side = max(1, math.isqrt(d // 3))
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
        images, factors = torch.rand(rows, 3, side, side, **options), torch.rand(rows, 5, **options)
        turned = torch.eye(2, 3, device=device, dtype=torch.float32) + 0.2 * torch.randn(rows, 2, 3, **options)
        return [images, turned, factors, indices(rows, 2**62)]
    return [draw(rows, d), draw(columns, d)]


def function(operator: str, implementation: str) -> Function:
    """What `anomem.functional` computes with one implementation, without its checks."""
    if implementation == "reference":
        return partial(_BY_REFERENCE[operator])
    return partial(_BY_KERNEL[operator], implementation)


def _memory(prototypes: Tensor) -> Memory:
    return Memory(prototypes, None, None, prototypes.shape[1] ** -0.5, "layer")


def _shrink(prototypes: Tensor) -> float:
    return 0.5 / prototypes.shape[0]


def _retrieve_reference(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(query)
    found = reference.hopfield_retrieve(query.to(dtype), prototypes.to(dtype))
    return found.out.to(query.dtype), found.lse


def _shrink_reference(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(query)
    found = reference.hopfield_retrieve(query.to(dtype), prototypes.to(dtype), shrink=_shrink(prototypes))
    return found.out.to(query.dtype), found.lse, reference.weights_entropy(found.weights)


def _nt_xent_reference(z: Tensor, z_pair: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(z)
    return (reference.nt_xent_rows(z.to(dtype), z_pair.to(dtype), 0.2),)


def _info_nce_reference(rows: Tensor, columns: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(rows)
    return (reference.info_nce_rows(rows.to(dtype), columns.to(dtype), positive, None, 0.1),)


def _deviation_map_reference(feature_map: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(feature_map)
    return (reference.deviation_map(feature_map.to(dtype), prototypes.to(dtype)),)


def _usage_reference(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(query)
    found = reference.memory_diagnostics(query.to(dtype), prototypes.to(dtype))
    return found.mass, found.entropy


def _usage_kernel(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    _, mass, entropy, _ = usages.usage(query, _memory(prototypes))
    return mass, entropy.mean()


def _nearest_reference(x: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(x)
    return (reference.nearest(x.to(dtype), prototypes.to(dtype), min(4, len(prototypes))).distance,)


def _nearest_kernel(impl: str, x: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    return (nearests.nearest(x[None], prototypes[None], min(4, len(prototypes)), impl)[0][0],)


def _read_reference(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(query)
    found = reference.read_memory(query.to(dtype), prototypes.to(dtype), top_k=min(_TOP_K, len(prototypes)))
    return found.out.to(query.dtype), found.residual, found.cosine, found.entropy, found.lse


def _read_kernel(impl: str, query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    memory = _memory(prototypes)._replace(keys=prototypes[None])
    found = reads.read(query[None], memory, None, min(_TOP_K, len(prototypes)), False, False, impl)
    out, residual, cosine, _, _, entropy, lse = (x[0] for x in found)
    return out, residual, cosine, entropy, lse


def _parameters(matrices: Tensor, factors: Tensor, keys: Tensor) -> reference.ViewParameters:
    brightness, contrasts, saturation, blur, noise = factors.unbind(dim=1)
    return reference.ViewParameters(matrices, brightness + 0.5, contrasts, saturation, blur * 2 - 1, noise / 9, keys)


def _augment_reference(images: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    return (reference.augment(images, _parameters(*given), "reflection", min(3, images.shape[-1] - 1)),)


def _augment_kernel(images: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    views, radius = len(images), min(3, images.shape[-1] - 1)
    parameters = reference.ViewParameters(*(x.contiguous() for x in _parameters(*given) if x is not None))
    return (augments.augment(images, parameters, views, radius, "reflection", False),)


def _batch_norm_reference(x: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    numbers = weight.to(accumulator(x)), bias.to(accumulator(x))
    return (reference.batch_norm(x, None, None, *numbers, True, 0.0, 1e-5, add=add, relu=True),)


def _batch_norm_kernel(x: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    numbers = weight.to(accumulator(x)), bias.to(accumulator(x))
    return (batch_norms.batch_norm(x, *numbers, add, 1e-5, True, None)[0],)


# Modules are named at the call, so that a test can put a wrong or slow kernel in the place of one.
_BY_REFERENCE: dict[str, Function] = {
    "retrieve": _retrieve_reference,
    "shrink": _shrink_reference,
    "nt_xent": _nt_xent_reference,
    "info_nce": _info_nce_reference,
    "gather": lambda feature_map, positions: (reference.gather_positions(feature_map, positions, normalize=True),),
    "variance": lambda x: (reference.variance_hinge(x.to(accumulator(x))),),
    "deviation_map": _deviation_map_reference,
    "usage": _usage_reference,
    "nearest": _nearest_reference,
    "read": _read_reference,
    "augment": _augment_reference,
    "batch_norm": _batch_norm_reference,
    "conv3x3": lambda x, weight: (reference.conv3x3(x, weight),),
    "downsample": lambda x, weight, shortcut: reference.downsample(x, weight, shortcut),
}
_BY_KERNEL: dict[str, Function] = {
    "retrieve": lambda impl, query, prototypes: retrieve.retrieve(query, _memory(prototypes), impl),
    "shrink": lambda impl, query, prototypes: retrieve.shrink(query, _memory(prototypes), _shrink(prototypes)),
    "nt_xent": lambda impl, z, z_pair: (contrast.nt_xent(z, z_pair, None, 0.2, impl),),
    "info_nce": lambda impl, rows, columns, positive: (
        contrast.info_nce(rows, columns, positive, None, None, 0.1, impl),
    ),
    "gather": lambda impl, feature_map, positions: (sampling.gather_positions(feature_map, positions, True),),
    "variance": lambda impl, x: (sampling.variance_hinge(x, 1.0, 1e-4),),
    "deviation_map": lambda impl, feature_map, prototypes: (
        deviation_maps.deviation_map(feature_map, _memory(prototypes), "cosine", None),
    ),
    "usage": lambda impl, query, prototypes: _usage_kernel(query, prototypes),
    "nearest": _nearest_kernel,
    "read": _read_kernel,
    "augment": lambda impl, *given: _augment_kernel(*given),
    "batch_norm": lambda impl, *given: _batch_norm_kernel(*given),
    "conv3x3": lambda impl, x, weight: (convolutions.conv3x3(x, weight),),
    "downsample": lambda impl, x, weight, shortcut: downsamples.downsample(x, weight, shortcut),
}


def _sdpa(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    width = query.shape[-1:]
    keys = F.layer_norm(prototypes, width)[None, None]
    return (F.scaled_dot_product_attention(F.layer_norm(query, width)[None, None], keys, keys)[0, 0],)


def _forward(one: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return one(*inputs)


def _both_passes(one: Function, inputs: list[Tensor], outputs: int) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def call() -> object:
        results = one(*leaves)[:outputs]
        return torch.autograd.grad(results, wanted, [torch.ones_like(result) for result in results])

    return call


def _results(one: Function, inputs: list[Tensor], operator: str) -> list[Tensor]:
    if operator in rules.INFERENCE:
        return list(_forward(one, inputs))
    return testing.gradients(one, inputs)


def _converted(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def _timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _done(seconds: dict[str, list[float]], passed: float) -> bool:
    """Whether no further round is needed, `passed` seconds after the first began."""
    rounds = len(next(iter(seconds.values())))
    if passed >= _MOST_SECONDS:
        return rounds > 0
    long = all(sum(values) >= _ENOUGH_SECONDS for values in seconds.values())
    enough = rounds >= _ENOUGH_ROUNDS or (rounds >= _ROUNDS and long)
    return enough and (passed >= _SECONDS or _separate(seconds))


def _separate(seconds: dict[str, list[float]], tie: float = 0.0) -> bool:
    """Whether the middle half of the fastest one's times lies below that of every other, and its least time too.

    Args:
        seconds: times by implementation.
        tie: an implementation whose median is at most so many times the least may overlap with the fastest; 0: none.
    """
    ordered = sorted((sorted(values) for name, values in seconds.items() if name != SDPA), key=median)
    if len(ordered) > 1 and len(ordered[0]) < _ROUNDS:
        return False
    best = ordered[0]

    def is_behind(other: list[float]) -> bool:
        return best[(3 * len(best)) // 4] < other[len(other) // 4] and best[0] < other[0]

    return all(is_behind(other) or median(other) <= tie * median(best) for other in ordered[1:])
