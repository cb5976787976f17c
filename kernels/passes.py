"""Passes of operators as prepared lists of steps: a call with known arguments only fills in pointers and the stream.

A pass is what one operator of `anomem.kernels.OPERATORS` does: allocations, a few operations of torch, and launches.
Which these are is decided in Python by shapes, strides, dtypes, numbers, the GPU, alignments, the tiles and torch's
switch for TF32. They are the key. The first call with a key runs the ordinary code, the second records its steps, and
later calls repeat them: the allocator, the stream and the pointers are those of the call.

A pass is not prepared
    - in the interpreter, and while tiles are searched for (`tile_search`);
    - with a profiler's hooks on Triton's launches;
    - where a step takes a tensor that is neither an argument nor the result of a step, or reads a value;
    - with more than MOST_STEPS steps, whose time on the GPU is long beside the host's.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from anomem.kernels import launching, tile_search
from anomem.kernels.primitives import INTERPRETING, allows_tf32, device_of

MOST_STEPS = 64
MOST_PREPARED = 1024
"""Keys that are remembered: a number that changes with every step, such as a scheduled temperature, makes new ones."""

Key = tuple[Any, ...]
Places = tuple[int, ...]
_ALLOCATIONS = ("new_empty", "empty_like", "empty", "new_empty_strided", "empty_strided")


class Step(NamedTuple):
    """A launch, or an operation of torch. Its arguments are values of the pass, chosen by place."""

    grid: tuple[int, int, int] | None
    """Of a launch."""
    run: Callable[..., Any]
    """Triton's launcher, or the operation."""
    before: tuple[Any, ...]
    """Of a launch what Triton's launcher takes between the stream and the kernel's arguments."""
    pick: Callable[[list[Any]], tuple[Any, ...]]
    """The arguments, from the values."""
    after: tuple[Any, ...]
    """Arguments after the picked ones: a kernel's constants."""
    results: int
    """Number of new values; −1 for a tuple of them."""
    dead: Places
    """Values that no later step reads: their memory is free from here on."""


class Pass(NamedTuple):
    """The steps of a pass. Its values are the arguments, the constants and the results of the steps, in this order."""

    constants: tuple[Any, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    """The places of what the operator returns."""


# A key that was met once has no entry in `_passes`; None stands for a pass that cannot be prepared.
_met: dict[Key, None] = {}
_passes: dict[Key, Pass | None] = {}
_lock = threading.Lock()


def run(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, from the third call on by prepared steps.

    Args:
        function: of `anomem.kernels.implementation`.
        args: of the operator's schema; the first is a tensor.

    Returns:
        The function's result, a tensor or a tuple of tensors.
    """
    key = key_of(function, args)
    if key is None or launching.hooked():
        return function(*args)
    prepared = _passes.get(key, key)
    if prepared is None:
        return function(*args)
    if prepared is not key:
        return _repeated(prepared, args)
    with _lock:
        first = key not in _met
        for known in (_met, _passes):
            while len(known) >= MOST_PREPARED:
                del known[next(iter(known))]
        _met[key] = None
    if first:
        return function(*args)
    result, _passes[key] = record(function, args)
    return result


def key_of(function: Callable[..., Any], args: tuple[Any, ...]) -> Key | None:
    """All that decides the steps of a pass; None where they are not to be prepared."""
    first = args[0]
    if INTERPRETING.value or not first.is_cuda:
        return None
    choice = tile_search.active()
    if choice is not None and getattr(choice, "search", False):
        return None
    tf32 = first.dtype == torch.float32 and allows_tf32()
    # Under autocast the operations of torch have casts among their steps.
    parts: list[Any] = [function, choice, tf32, torch._C._is_any_autocast_enabled()]
    for arg in args:
        if isinstance(arg, Tensor):
            parts += (arg.dtype, arg.get_device(), arg.shape, arg.stride(), arg.data_ptr() & 15)
        else:
            parts += (arg.__class__, arg)  # 1 equals 1.0 and True
    return tuple(parts)


def forget() -> None:
    """Prepare all passes anew: tests change what no argument tells, such as the size of the scratch."""
    with _lock:
        _met.clear()
        _passes.clear()


def _repeated(prepared: Pass, args: tuple[Any, ...]) -> Any:
    values = [*args, *prepared.constants]
    first = args[0]
    with device_of(first):
        stream = launching.current_stream(first.device.index)
        for grid, call, before, pick, after, results, dead in prepared.steps:
            if grid is not None:
                call(*grid, stream, *before, *pick(values), *after)
            elif results == 1:
                values.append(call(*pick(values), *after))
            else:
                made = call(*pick(values), *after)
                if results:
                    values.extend(made)
            for place in dead:
                values[place] = None
    return tuple([values[place] for place in prepared.results])


def record(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Pass | None]:
    """The function's result and the steps that led to it, None where they cannot be repeated."""
    # Aliases tell apart two arguments that are one tensor.
    given = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    recorder = _Recorder(given)
    launching.recording.steps = recorder
    try:
        with recorder:
            result = function(*given)
    finally:
        launching.recording.steps = None
    return result, recorder.prepared(result)


class _Unplaced(NamedTuple):
    """A step whose arguments have no places yet; fields as of `Step`."""

    grid: tuple[int, int, int] | None
    run: Callable[..., Any]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    results: int

    @property
    def is_view(self) -> bool:
        """Whether the step changes nothing, so that it may be left out."""
        return self.run is torch.as_strided or getattr(self.run, "is_view", False)


class _Recorder(TorchDispatchMode):
    """Records the operations of torch that it sees, and the launches that `launch_kernel` reports."""

    def __init__(self, given: list[Any]) -> None:
        super().__init__()
        self._given = len(given)
        self._constants: list[Any] = []
        self._steps: list[tuple[_Unplaced, list[int], list[int]]] = []
        """Steps, places of their arguments and of what they make: −1 − n for the n-th result of all steps."""
        self._made = 0
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._repeatable = True
        self._roots: dict[int, tuple[int, int]] = {}
        """Of a view by its place: the place of what it is a view of, and the first element there."""
        self._views: dict[tuple[Any, ...], int] = {}
        """Places of views by what they show: equal ones are made once."""
        self._fresh: set[int] = set()
        """Places of results with memory of their own."""
        for place, arg in enumerate(given):
            if isinstance(arg, Tensor):
                self._places[id(arg)] = weakref.ref(arg), place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._repeatable:
            return result
        several = not isinstance(result, Tensor)
        made = list(result) if isinstance(result, tuple | list) else [result]
        if not all(isinstance(one, Tensor) for one in made):
            self._repeatable = False  # a value was read
            return result
        known = [self._place(one) is not None for one in made]
        if any(known) and not all(known):
            self._repeatable = False
            return result
        if func.is_view and not several and self._view(func, args, kwargs, result):
            return result
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS and result.is_cuda:
            layout = (tuple(result.shape), result.stride(), result.dtype, result.device)
            at = self._add(_Unplaced(None, _allocate, (), layout, 1), [], made)
        else:
            call = func
            if any(isinstance(arg, list | tuple) and any(isinstance(one, Tensor) for one in arg) for arg in args):
                args, layout = tree_flatten((args, kwargs))
                call = _laid_out(func, layout)
            elif kwargs:
                call = _by_name(func, len(args), tuple(kwargs))
                args = (*args, *kwargs.values())
            places = [self._argument(arg) for arg in args]
            new = [] if all(known) else made
            at = self._add(_Unplaced(None, call, (), (), -1 if several and new else len(new)), places, new)
        self._fresh.update([] if func.is_view else at)
        return result

    def _view(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
        """Record a view of a known value without its way there: none where it shows all, one step else."""
        base = args[0]
        place = self._place(base)
        if place is None or kwargs or result.dtype != base.dtype:
            return False
        root, first = self._roots.get(place, (place, 0))
        first += result.storage_offset() - base.storage_offset()
        seen = (root, first, result.shape, result.stride())
        whole = first == 0 and place == root and (result.shape, result.stride()) == (base.shape, base.stride())
        at = place if whole else self._views.get(seen)
        if at is not None:
            self._places[id(result)] = weakref.ref(result), at
            return True
        if root in self._fresh:  # of an argument the offset is known at the call only
            layout = (tuple(result.shape), result.stride(), result.storage_offset())
            (at,) = self._add(_Unplaced(None, torch.as_strided, (), layout, 1), [root], [result])
        else:
            (at,) = self._add(_Unplaced(None, func, (), (), 1), [self._argument(arg) for arg in args], [result])
        self._roots[at], self._views[seen] = (root, first), at
        return True

    def launch(self, bound: launching.Bound, rows: int, columns: int, arguments: Iterable[Any]) -> None:
        """Note a launch of a grid with these arguments before its constants."""
        before = (bound.function, bound.metadata, None, None, None)
        step = _Unplaced((rows, columns, 1), bound.run, before, bound.constants, 0)
        self._add(step, [self._argument(arg) for arg in arguments], [])

    def _add(self, step: "_Unplaced", places: list[int], made: list[Tensor]) -> list[int]:
        """The places of what the step makes."""
        new = [-1 - self._made - i for i in range(len(made))]
        self._made += len(made)
        for tensor, place in zip(made, new, strict=True):
            self._places[id(tensor)] = weakref.ref(tensor), place
        self._steps.append((step, places, new))
        self._repeatable &= len(self._steps) <= MOST_STEPS
        return new

    def _place(self, tensor: Tensor) -> int | None:
        """Of an argument ≥ 0, of a step's result −1 − its number; None for another tensor."""
        reference, place = self._places.get(id(tensor), (None, None))
        return place if reference is not None and reference() is tensor else None

    def _argument(self, value: Any) -> int:
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is None:
                self._repeatable = False
                return 0
            return place
        self._constants.append(value)
        return self._given + len(self._constants) - 1

    def prepared(self, result: Any) -> Pass | None:
        """The steps; `result` is what the pass returned."""
        results = [self._place(one) for one in result] if isinstance(result, tuple) else [None]
        if not self._repeatable or any(place is None for place in results):
            return None
        kept: list[tuple[_Unplaced, list[int], list[int]]] = []
        wanted = {*results}
        for step, places, new in reversed(self._steps):
            if new and step.is_view and not wanted.intersection(new):
                continue  # a view on the way to another one
            wanted.update(places)
            kept.append((step, places, new))
        kept.reverse()
        first = self._given + len(self._constants)
        made = [place for _, _, new in kept for place in new]
        settled = {place: first + number for number, place in enumerate(made)}
        returned = tuple(settled.get(place, place) for place in results if place is not None)
        alive = {*returned}
        steps: list[Step] = []
        for step, unsettled, _ in reversed(kept):
            at = tuple(settled.get(place, place) for place in unsettled)
            dead = {place for place in at if place >= first} - alive
            alive |= dead
            steps.append(Step(step.grid, step.run, step.before, _picking(at), step.after, step.results, tuple(dead)))
        return Pass(tuple(self._constants), tuple(reversed(steps)), returned)


def _allocate(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _by_name(func: Any, positional: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """The operation as a function of its arguments by position, then those by name."""

    def call(*args: Any) -> Any:
        return func(*args[:positional], **dict(zip(names, args[positional:], strict=True)))

    return call


def _laid_out(func: Any, layout: Any) -> Callable[..., Any]:
    """The operation as a function of all its arguments in a row, those in lists too."""

    def call(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, layout)
        return func(*args, **kwargs)

    return call


def _picking(places: Places) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
