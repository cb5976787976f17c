"""Runs the blocks of a compiled kernel one after another, the threads of a block in lockstep.

Values are those of the hardware but for `ex2` and `lg2`, which are rounded correctly here. What this finds beside wrong
values: `memory`. What it does not see: ptxas, clocks, two blocks at the same time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.formats import Array
from tests.ptx.matrix import MatrixUnit
from tests.ptx.memory import Fault, GlobalMemory, SharedMemory
from tests.ptx.program import Program
from tests.ptx.tensor_memory import TensorMemory
from tests.ptx.warpgroup import WarpGroup

_LONGEST = 4_000_000  # instructions of a block
_WHOLE_WARPS = ("shfl", "redux", "mma", "ldmatrix", "stmatrix", "wgmma", "elect")


class Block(TensorMemory, WarpGroup, MatrixUnit):
    """One block: where its threads stand, and what they execute."""

    def run(self, program: Program) -> None:
        """To the end of the program. Threads that jump apart wait for each other where they meet or at a barrier."""
        active, waiting = self.all.copy(), dict[int, Array]()
        at, steps, parked = 0, 0, set[int]()
        while at < len(program.instructions):
            if at in waiting:
                active = active | waiting.pop(at)
            instruction = program.instructions[at]
            steps += 1
            if steps > _LONGEST:
                raise Fault("does not end")
            mask = active
            if instruction.guard is not None:
                mask = (self.registers[instruction.guard] ^ instruction.negated) & active
            name = instruction.words[0]
            if name == "bra":
                target = program.labels[instruction.operands[0]]
                if not mask.any():
                    at += 1
                elif (mask == active).all() and not waiting:
                    at = target
                else:
                    waiting[target] = waiting.get(target, ~self.all) | mask
                    active = active & ~mask
                    # The smaller part goes first: the others may wait for what it issues.
                    at = at + 1 if active.any() else min(waiting, key=lambda place: (waiting[place].sum(), place))
                continue
            if name in ("bar", "barrier") and not active.all():
                waiting[at] = waiting.get(at, ~self.all) | active
                active = ~self.all
                others = [place for place in waiting if place != at]
                if not others or len(waiting) > 8:
                    raise Fault("a barrier that not all threads reach")
                at = min(others, key=lambda place: (place in parked, place))
                parked.add(at)
                continue
            parked.clear()
            if name == "ret":
                if mask.all():
                    return
                raise Fault("some threads return before the others")
            try:
                self._execute(instruction.words, instruction.operands, mask, active)
            except Fault as fault:
                raise Fault(f"{fault}; at `{instruction.text}`") from None
            at += 1

    def do_bar(self, words: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        if not mask.all():
            raise Fault("a barrier that not all threads reach")
        self.shared.barrier()

    do_barrier = do_bar

    def _execute(self, words: tuple[str, ...], operands: tuple[str, ...], mask: Array, active: Array) -> None:
        together = words[0] in _WHOLE_WARPS or words[:2] in (("tcgen05", "ld"), ("tcgen05", "st"))
        if together and not active.all():
            warps = active.reshape(self.warps, 32)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("a warp does this together, but its lanes have parted")
        function = getattr(self, f"do_{words[0]}", None)
        if function is None:
            raise NotImplementedError(".".join(words))
        function(words, operands, mask)


def launch(
    program: Program,
    memory: GlobalMemory,
    arguments: list[int | float],
    grid: tuple[int, int, int],
    *,
    warps: int,
    shared_bytes: int,
    copies_need_fence: bool = True,
) -> None:
    """Run all blocks of a launch.

    Args:
        program: the kernel.
        memory: global memory.
        arguments: addresses and numbers, in the order of the kernel. Triton's own further parameters are zero.
        grid: blocks along each axis.
        warps: of a block.
        shared_bytes: of a block.
        copies_need_fence: see `SharedMemory`.

    Raises:
        Fault: the kernel does what PTX leaves undefined.
    """
    arguments = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    values = {name: _parameter(kind, value) for (kind, name), value in zip(program.parameters, arguments, strict=True)}
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    shared = SharedMemory(shared_bytes, copies_need_fence=copies_need_fence)
                    Block(memory, shared, warps, (x, y, z), grid, values).run(program)


def _parameter(kind: str, value: int | float) -> Any:
    if kind == "f32":
        return np.float32(value).view(np.uint32)
    return np.uint64(value) if kind.endswith("64") else np.uint32(int(value) & 0xFFFFFFFF)
