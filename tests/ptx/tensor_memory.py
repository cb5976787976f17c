"""tcgen05 (sm_100): tensor memory and its products, and the mbarriers that tell their end.

Products run in the order of their issue, and as late as they may: when a thread waits for their mbarrier. Until then
operands and accumulators are in flight.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np

from tests.ptx.formats import READERS, Array, from_bytes
from tests.ptx.memory import Fault
from tests.ptx.threads import Operands, Words
from tests.ptx.warpgroup import WarpGroup, operand_addresses

_LANES, _COLUMNS = 128, 512
_SWIZZLE = {0: 16, 2: 128, 4: 64, 6: 32}


class _Barrier:
    """An mbarrier: how many of its phases have ended."""

    def __init__(self) -> None:
        self.phases = 0


class _Tensor:
    """Tensor memory of a block and the work that was issued for it."""

    def __init__(self) -> None:
        self.words = np.full((_LANES, _COLUMNS), 0x7FC12345, np.uint32)
        self.written = np.zeros((_LANES, _COLUMNS), bool)
        self.in_flight = np.zeros((_LANES, _COLUMNS), np.int16)
        self.issued: list[Callable[[], None] | _Barrier] = []
        """Products, and mbarriers that a commit makes arrive."""
        self.barriers: dict[int, _Barrier] = {}


class TensorMemory(WarpGroup):
    """mbarrier, elect and tcgen05."""

    @property
    def tensor(self) -> _Tensor:
        """Made when it is first used."""
        if not hasattr(self, "_tensor"):
            self._tensor = _Tensor()
        return self._tensor

    def do_elect(self, words: Words, operands: Operands, mask: Array) -> None:
        register, predicate = operands[0].split("|")
        self.put(predicate, self.lane == 0, mask)
        self.put(register, np.zeros(self.count, np.uint32), mask)

    def do_mbarrier(self, words: Words, operands: Operands, mask: Array) -> None:
        tensor = self.tensor
        if words[1] in ("init", "inval"):
            thread = self._one(mask, "mbarrier." + words[1])
            if thread is None:
                return
            place = int(self.address(operands[0], 32)[thread])
            if words[1] == "init":
                tensor.barriers[place] = _Barrier()
            elif any(one is tensor.barriers[place] for one in tensor.issued):
                raise Fault("mbarrier.inval with work outstanding")
            else:
                del tensor.barriers[place]
        elif words[1] == "try_wait":
            if mask.any():
                self._wait(self.address(operands[1], 32)[mask], self.bits(operands[2], 32)[mask])
                self.put(operands[0], self.all, mask)
        else:
            raise NotImplementedError(".".join(words))

    def _wait(self, places: Array, parities: Array) -> None:
        if (places != places[0]).any() or (parities != parities[0]).any():
            raise Fault("threads wait for different mbarriers")
        tensor = self.tensor
        barrier = tensor.barriers.get(int(places[0]))
        if barrier is None:
            raise Fault("waits for an mbarrier that was not initialised")
        while barrier.phases % 2 == int(parities[0]):  # the phase of this parity has not ended
            if not any(one is barrier for one in tensor.issued):
                raise Fault("nothing will end this phase of the mbarrier")
            work = tensor.issued.pop(0)
            if isinstance(work, _Barrier):
                work.phases += 1
            else:
                work()

    def do_tcgen05(self, words: Words, operands: Operands, mask: Array) -> None:
        tensor, name = self.tensor, words[1].split("::")[0]
        if name == "alloc":
            leaders = mask & (self.lane == 0)
            if leaders.sum() != 1:
                raise Fault("tcgen05.alloc by several warps")
            self.shared.write(self.address(operands[0], 32), np.zeros((self.count, 4), np.uint8), self.warp, leaders)
        elif name == "dealloc":
            if tensor.in_flight.any():
                raise Fault("tensor memory is freed with work outstanding")
        elif name in ("ld", "st"):
            self._move(words, operands, mask, loads=name == "ld")
        elif name == "commit":
            thread = self._one(mask, "tcgen05.commit")
            if thread is not None:
                tensor.issued.append(tensor.barriers[int(self.address(operands[0], 32)[thread])])
        elif name == "mma":
            self._issue(words, operands, mask)
        elif name not in ("relinquish_alloc_permit", "wait", "fence"):
            raise NotImplementedError(".".join(words))

    def _move(self, words: Words, operands: Operands, mask: Array, *, loads: bool) -> None:
        """Between registers and tensor memory."""
        if not mask.any():
            return
        tensor = self.tensor
        shape = next(word for word, after in itertools.pairwise(words) if re.fullmatch(r"x\d+", after))
        registers = self.listed(operands[0] if loads else operands[-1])
        address = self._tensor_address(operands[1] if loads else operands[0])
        lanes, columns = address >> 16, address & 0xFFFF
        if shape == "32x32b":
            lanes = lanes + self.lane
        elif shape == "16x32bx2":
            split = int(operands[-1] if loads else operands[1], 0)
            lanes, columns = lanes + self.lane % 16, columns + self.lane // 16 * split
        else:
            raise NotImplementedError(".".join(words))
        if ((lanes // 32) != self.warp % 4)[mask].any():
            raise Fault("a warp accesses the tensor memory of another one")
        for i, register in enumerate(registers):
            place = lanes[mask], columns[mask] + i
            if tensor.in_flight[place].any():
                raise Fault(
                    f"tensor memory is {'read' if loads else 'written'} while a product that uses it is in flight"
                )
            if not loads:
                tensor.words[place], tensor.written[place] = self.bits(register, 32)[mask], True
                continue
            if not tensor.written[place].all():
                raise Fault("reads tensor memory that nobody wrote")
            value = np.zeros(self.count, np.uint32)
            value[mask] = tensor.words[place]
            self.put(register, value, mask)

    def _issue(self, words: Words, operands: Operands, mask: Array) -> None:
        """Take a product's operands; compute it when it is waited for."""
        thread = self._one(mask, "tcgen05.mma")
        if thread is None:
            return
        tensor = self.tensor
        instruction = int(self.bits(operands[3], 32)[thread])
        accumulates = bool(self.predicate(operands[4])[thread])
        columns, rows = (instruction >> 17 & 63) * 8, (instruction >> 24 & 31) * 16
        kind = "tf32" if "tf32" in words[3] else {0: "f16", 1: "bf16"}[instruction >> 7 & 7]
        size = 4 if kind == "tf32" else 2
        depth = 32 // size
        row = np.arange(rows)
        lanes = row // 16 * 32 + row % 16 if rows == 64 else row
        result = self._place(operands[0], thread, lanes, columns)
        b = self._descriptor(operands[2], thread, not instruction >> 16 & 1, columns, depth, size)
        self.shared.operand(b, size)
        tensor.in_flight[result] += 1
        if operands[1].startswith("["):
            a, a_place = None, self._place(operands[1], thread, lanes, depth * size // 4)
            tensor.in_flight[a_place] += 1
        else:
            a, a_place = self._descriptor(operands[1], thread, not instruction >> 15 & 1, rows, depth, size), None
            self.shared.operand(a, size)

        def shared_matrix(addresses: Array) -> Array:
            self.shared.release(addresses, size)
            matrix = READERS[kind](from_bytes(self.shared.operand(addresses, size), size))
            self.shared.release(addresses, size)
            return matrix.astype(np.float64)

        def compute() -> None:
            if a is not None:
                left = shared_matrix(a)
            else:
                assert a_place is not None
                if not tensor.written[a_place].all():
                    raise Fault("tcgen05.mma reads tensor memory that nobody wrote")
                words_of_a = np.ascontiguousarray(tensor.words[a_place])
                left = READERS[kind](words_of_a.view(np.uint32 if size == 4 else np.uint16)).astype(np.float64)
                tensor.in_flight[a_place] -= 1
            total = left @ shared_matrix(b).T
            if accumulates:
                if not tensor.written[result].all():
                    raise Fault("tcgen05.mma adds to tensor memory that nobody wrote")
                total = total + tensor.words[result].view(np.float32)
            tensor.words[result], tensor.written[result] = total.astype(np.float32).view(np.uint32), True
            tensor.in_flight[result] -= 1

        tensor.issued.append(compute)

    def _place(self, operand: str, thread: int, lanes: Array, columns: int) -> tuple[Array, ...]:
        address = int(self._tensor_address(operand)[thread])
        return np.ix_((address >> 16) + lanes, (address & 0xFFFF) + np.arange(columns))

    def _descriptor(self, operand: str, thread: int, along_depth: bool, rows: int, depth: int, size: int) -> Array:
        descriptor = int(self.bits(operand, 64)[thread])
        return operand_addresses(descriptor, _SWIZZLE[descriptor >> 61], along_depth, rows, depth, size)

    def _tensor_address(self, operand: str) -> Array:
        parts = re.match(r"\[\s*(%\w+)\s*(?:\+\s*(\d+))?\s*\]", operand)
        assert parts is not None, operand
        return self.bits(parts[1], 32).astype(np.int64) + int(parts[2] or 0)

    @staticmethod
    def _one(mask: Array, what: str) -> int | None:
        """The one thread of the mask; None without any."""
        if mask.sum() > 1:
            raise Fault(f"{what} by {mask.sum()} threads")
        return int(np.flatnonzero(mask)[0]) if mask.any() else None
