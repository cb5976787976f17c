"""The threads of one block in lockstep: registers, operands and the instructions of a single thread."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.formats import (
    DTYPES,
    RAW,
    Array,
    bytes_of,
    flush,
    from_bf16,
    from_bytes,
    from_f16,
    to_bf16,
    to_f16,
)
from tests.ptx.memory import Fault, GlobalMemory, SharedMemory

Words = tuple[str, ...]
Operands = tuple[str, ...]
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_UNDEFINED = 0x7FFFDEAD7FFFDEAD  # what LLVM leaves undefined reads as a NaN


class Threads:
    """Registers, one array over the threads each, and what executes on them.

    A method `do_NAME` executes an instruction: its words, its operands and the mask of threads that take part.

    Args:
        memory: global memory.
        shared: shared memory of the block.
        warps: of the block.
        block: (x, y, z) in the grid.
        grid: its size.
        parameters: of the kernel, as unsigned integers, by name.
    """

    def __init__(
        self,
        memory: GlobalMemory,
        shared: SharedMemory,
        warps: int,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, Any],
    ) -> None:
        self.memory, self.shared, self.parameters = memory, shared, parameters
        self.warps, self.count = warps, 32 * warps
        self.number = 1 + block[0] + grid[0] * (block[1] + grid[1] * block[2])
        index = np.arange(self.count, dtype=np.uint32)
        self.warp, self.lane = (index // 32).astype(np.int64), (index % 32).astype(np.int64)
        self.special = {"%tid.x": index, "%tid.y": index * 0, "%tid.z": index * 0, "%laneid": index % 32}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.full(self.count, block[axis], np.uint32)
            self.special[f"%nctaid.{name}"] = np.full(self.count, grid[axis], np.uint32)
        self.registers: dict[str, Array] = {}
        self.all = np.ones(self.count, bool)

    # Operands

    def bits(self, operand: str, width: int) -> Array:
        """An operand as unsigned integers of so many bits, [T]."""
        raw = RAW[width // 8]
        if operand in self.registers:
            value = self.registers[operand]
            # A narrow load into a wide register extends with zeros.
            return value.astype(raw) if value.dtype != bool and value.dtype.itemsize * 8 < width else value
        if operand in self.special:
            return self.special[operand].astype(raw)
        if operand.startswith("%"):
            return self._constant(_UNDEFINED, raw)
        if operand == "global_smem":
            return np.zeros(self.count, raw)
        if operand[:2].lower() in ("0f", "0d"):
            return np.full(self.count, int(operand[2:], 16), np.uint32 if operand[1] in "fF" else np.uint64)
        return self._constant(int(operand, 0), raw)

    def value(self, operand: str, kind: str) -> Array:
        """An operand as numbers of a PTX type, [T]."""
        dtype = np.dtype(DTYPES[kind])
        value = self.bits(operand, dtype.itemsize * 8)
        if value.dtype.itemsize != dtype.itemsize:
            value = value.astype(RAW[dtype.itemsize])
        return value.view(dtype)

    def predicate(self, operand: str) -> Array:
        """A predicate, [T] bool."""
        return self.registers[operand] if operand.startswith("%") else np.full(self.count, int(operand) != 0)

    def put(self, register: str, value: Array, mask: Array) -> None:
        """Write a register of the threads of the mask."""
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(RAW[value.dtype.itemsize])
        if not mask.all():
            before = self.registers.get(register)
            value = np.where(mask, value, np.zeros(self.count, value.dtype) if before is None else before)
        self.registers[register] = value

    def address(self, operand: str, width: int) -> Array:
        """The address in brackets, [T]: 32 bits in shared, 64 bits in global memory."""
        parts = re.match(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert parts is not None, operand
        base, offset = self.bits(parts[1], width), int(parts[2], 0) if parts[2] else 0
        return base.astype(np.int64) + offset if width == 32 else base + np.uint64(offset & (2**64 - 1))

    @staticmethod
    def listed(operand: str) -> list[str]:
        """The registers of a vector in braces, or the one register."""
        return [name.strip() for name in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]

    def _constant(self, number: int, raw: Any) -> Array:
        return np.full(self.count, number & ((1 << 8 * np.dtype(raw).itemsize) - 1), raw)

    # Moves

    def do_mov(self, words: Words, operands: Operands, mask: Array) -> None:
        target, source = operands
        if words[1] == "pred":
            self.put(target, self.predicate(source), mask)
            return
        width = int(words[1][1:])
        if target.startswith("{"):
            parts = self.listed(target)
            value, each = self.bits(source, width), width // len(parts)
            for i, register in enumerate(parts):
                if register != "_":
                    self.put(register, (value >> value.dtype.type(i * each)).astype(RAW[each // 8]), mask)
        elif source.startswith("{"):
            parts = self.listed(source)
            raw, each = RAW[width // 8], width // len(parts)
            whole = np.zeros(self.count, raw)
            for i, register in enumerate(parts):
                whole |= self.bits(register, each).astype(raw) << raw(i * each)
            self.put(target, whole, mask)
        else:
            self.put(target, self.bits(source, width), mask)

    def do_ld(self, words: Words, operands: Operands, mask: Array) -> None:
        if words[1] == "param":
            self.put(operands[0], np.full(self.count, self.parameters[operands[1].strip("[] ")]), mask)
            return
        registers, size = self.listed(operands[0]), int(words[-1][1:]) // 8
        width = size * len(registers)
        if words[1].startswith("shared"):
            data = self.shared.read(self.address(operands[1], 32), width, self.warp, mask)
        else:
            data = self.memory.read(self.address(operands[1], 64), width, mask)
        for i, register in enumerate(registers):
            self.put(register, from_bytes(data[:, i * size : (i + 1) * size], size), mask)

    def do_st(self, words: Words, operands: Operands, mask: Array) -> None:
        size = int(words[-1][1:]) // 8
        columns = [bytes_of(self.bits(name, size * 8).astype(RAW[size])) for name in self.listed(operands[1])]
        data = np.concatenate(columns, axis=1)
        if words[1].startswith("shared"):
            self.shared.write(self.address(operands[0], 32), data, self.warp, mask)
        else:
            self.memory.write(self.address(operands[0], 64), data, mask, self.number)

    def do_cp(self, words: Words, operands: Operands, mask: Array) -> None:
        """cp.async"""
        if "commit_group" in words:
            self.shared.commit()
        elif "wait_group" in words:
            self.shared.wait(int(operands[0]))
        else:
            width = int(operands[2], 0)
            size = self.bits(operands[3], 32) if len(operands) > 3 else np.full(self.count, width)
            if (mask & (size != 0) & (size != width)).any():
                raise Fault("cp.async of a part of its width")
            data = self.memory.read(self.address(operands[1], 64), width, mask & (size > 0))
            self.shared.write(self.address(operands[0], 32), data, self.warp, mask, copied=True)

    def do_fence(self, words: Words, operands: Operands, mask: Array) -> None:
        if "async" in words or "async::shared::cta" in ".".join(words):
            self.shared.fence()

    # Arithmetic

    def do_add(self, words: Words, operands: Operands, mask: Array) -> None:
        self._two(words, operands, mask, np.add)

    def do_sub(self, words: Words, operands: Operands, mask: Array) -> None:
        self._two(words, operands, mask, np.subtract)

    def do_mul(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        if "wide" not in words and "hi" not in words:
            self._two(words, operands, mask, np.multiply)
            return
        wide = np.int64 if kind[0] == "s" else np.uint64
        product = self.value(operands[1], kind).astype(wide) * self.value(operands[2], kind).astype(wide)
        size = np.dtype(DTYPES[kind]).itemsize
        if "wide" in words:
            self.put(operands[0], product.view(np.uint64).astype(RAW[2 * size]), mask)
        else:
            self.put(operands[0], (product >> wide(8 * size)).astype(DTYPES[kind]), mask)

    def do_mad(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        if "wide" in words:
            wide = np.int64 if kind[0] == "s" else np.uint64
            product = self.value(operands[1], kind).astype(wide) * self.value(operands[2], kind).astype(wide)
            self.put(operands[0], product.view(np.uint64) + self.bits(operands[3], 64), mask)
        else:
            x, y, z = (self.value(operand, "u" + kind[1:]) for operand in operands[1:4])
            self.put(operands[0], x * y + z, mask)

    def do_fma(self, words: Words, operands: Operands, mask: Array) -> None:
        if words[-1] == "f32x2":
            x, y, z = (self.bits(operand, 64).view(np.float32).astype(np.float64) for operand in operands[1:4])
            self.put(operands[0], (x * y + z).astype(np.float32).view(np.uint64), mask)
        else:
            x, y, z = (self.value(operand, "f32").astype(np.float64) for operand in operands[1:4])
            self.put(operands[0], (x * y + z).astype(np.float32), mask)

    def do_div(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        x, y = self.value(operands[1], kind), self.value(operands[2], kind)
        if kind[0] == "f":
            quotient = x / y
        else:
            x, y = x.astype(np.int64), y.astype(np.int64)
            quotient = np.sign(x) * np.sign(y) * (np.abs(x) // np.maximum(np.abs(y), 1))
        self.put(operands[0], quotient.astype(DTYPES[kind]), mask)

    def do_rem(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        x, y = (self.value(operand, kind).astype(np.int64) for operand in operands[1:3])
        self.put(operands[0], np.fmod(x, np.where(y == 0, 1, y)).astype(DTYPES[kind]), mask)

    def do_min(self, words: Words, operands: Operands, mask: Array) -> None:
        self._extreme(words, operands, mask, np.fmin if words[-1][0] == "f" else np.minimum)

    def do_max(self, words: Words, operands: Operands, mask: Array) -> None:
        keeps_nan = words[-1][0] != "f" or "NaN" in words
        self._extreme(words, operands, mask, np.maximum if keeps_nan else np.fmax)

    def do_neg(self, words: Words, operands: Operands, mask: Array) -> None:
        self.put(operands[0], (-self.value(operands[1], words[-1])).astype(DTYPES[words[-1]]), mask)

    def do_abs(self, words: Words, operands: Operands, mask: Array) -> None:
        self.put(operands[0], np.abs(self.value(operands[1], words[-1])), mask)

    def do_sqrt(self, words: Words, operands: Operands, mask: Array) -> None:
        self.put(operands[0], np.sqrt(self.value(operands[1], "f32")), mask)

    def do_rcp(self, words: Words, operands: Operands, mask: Array) -> None:
        self.put(operands[0], np.float32(1) / self.value(operands[1], "f32"), mask)

    def do_ex2(self, words: Words, operands: Operands, mask: Array) -> None:
        x = self.value(operands[1], "f32")
        y = np.exp2((flush(x) if "ftz" in words else x).astype(np.float64)).astype(np.float32)
        self.put(operands[0], flush(y) if "ftz" in words else y, mask)

    def do_lg2(self, words: Words, operands: Operands, mask: Array) -> None:
        self.put(operands[0], np.log2(self.value(operands[1], "f32").astype(np.float64)).astype(np.float32), mask)

    def _two(self, words: Words, operands: Operands, mask: Array, function: Callable[..., Array]) -> None:
        kind = words[-1]
        if kind in ("bf16", "f16") and "f32" in words:  # sm_100: a 16-bit and a float32 operand
            x = (from_bf16 if kind == "bf16" else from_f16)(self.bits(operands[1], 16).astype(np.uint16))
            self.put(operands[0], function(x, self.value(operands[2], "f32")).astype(np.float32), mask)
            return
        if kind == "f32x2":
            x, y = (self.bits(operand, 64).view(np.float32) for operand in operands[1:3])
            self.put(operands[0], function(x, y).astype(np.float32).view(np.uint64), mask)
            return
        kind = "u" + kind[1:] if kind[0] == "s" else kind  # wraps around
        x = function(self.value(operands[1], kind), self.value(operands[2], kind))
        self.put(operands[0], (flush(x) if "ftz" in words else x).astype(DTYPES[kind]), mask)

    def _extreme(self, words: Words, operands: Operands, mask: Array, function: Callable[..., Array]) -> None:
        x = self.value(operands[1], words[-1])
        for operand in operands[2:]:  # sm_100 takes three
            x = function(x, self.value(operand, words[-1]))
        self.put(operands[0], x.astype(DTYPES[words[-1]]), mask)

    # Bits

    def do_and(self, words: Words, operands: Operands, mask: Array) -> None:
        self._logic(words, operands, mask, np.bitwise_and)

    def do_or(self, words: Words, operands: Operands, mask: Array) -> None:
        self._logic(words, operands, mask, np.bitwise_or)

    def do_xor(self, words: Words, operands: Operands, mask: Array) -> None:
        self._logic(words, operands, mask, np.bitwise_xor)

    def do_not(self, words: Words, operands: Operands, mask: Array) -> None:
        is_predicate = words[-1] == "pred"
        x = self.predicate(operands[1]) if is_predicate else self.bits(operands[1], int(words[-1][1:]))
        self.put(operands[0], ~x, mask)

    def do_shl(self, words: Words, operands: Operands, mask: Array) -> None:
        width = int(words[-1][1:])
        x, by = self.bits(operands[1], width), self.bits(operands[2], 32).astype(np.int64)
        shifted = x << np.minimum(by, width - 1).astype(x.dtype)
        self.put(operands[0], np.where(by >= width, 0, shifted).astype(x.dtype), mask)

    def do_shr(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        width = int(kind[1:])
        x, by = self.value(operands[1], kind), self.bits(operands[2], 32).astype(np.int64)
        shifted = x >> np.minimum(by, width - 1).astype(x.dtype)
        self.put(operands[0], np.where((by >= width) & (kind[0] != "s"), 0, shifted).astype(x.dtype), mask)

    def do_bfe(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = words[-1]
        first, length = int(operands[2]), int(operands[3])
        x = self.value(operands[1], "u" + kind[1:]).astype(np.uint64) >> np.uint64(first)
        x &= np.uint64((1 << length) - 1)
        if kind[0] == "s":
            sign = np.uint64((1 << 64) - (1 << length))
            x = np.where((x >> np.uint64(length - 1)) & np.uint64(1), x | sign, x)
        self.put(operands[0], x.view(np.int64).astype(DTYPES["s" + kind[1:]]), mask)

    def do_prmt(self, words: Words, operands: Operands, mask: Array) -> None:
        low, high = (self.bits(operand, 32).astype(np.uint64) for operand in operands[1:3])
        both, selector = low | (high << np.uint64(32)), self.bits(operands[3].rstrip("U"), 32)
        result = np.zeros(self.count, np.uint32)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
        self.put(operands[0], result, mask)

    def _logic(self, words: Words, operands: Operands, mask: Array, function: Callable[..., Array]) -> None:
        if words[-1] == "pred":
            x, y = (self.predicate(operand) for operand in operands[1:3])
        else:
            x, y = (self.bits(operand, int(words[-1][1:])) for operand in operands[1:3])
        self.put(operands[0], function(x, y), mask)

    # Conversions, comparisons, exchange

    def do_cvt(self, words: Words, operands: Operands, mask: Array) -> None:
        source, target = words[-1], words[-2]
        pack = {"bf16x2": to_bf16, "f16x2": to_f16}.get(target)
        if pack is not None:
            high, low = (pack(self.value(operand, "f32")).astype(np.uint32) for operand in operands[1:3])
            self.put(operands[0], (high << 16) | low, mask)
        elif target in ("bf16", "f16"):
            self.put(operands[0], (to_bf16 if target == "bf16" else to_f16)(self.value(operands[1], "f32")), mask)
        elif source in ("bf16", "f16"):
            bits = self.bits(operands[1], 16).astype(np.uint16)
            self.put(operands[0], (from_bf16 if source == "bf16" else from_f16)(bits), mask)
        else:
            self.put(operands[0], self.value(operands[1], source).astype(DTYPES[target]), mask)

    def do_setp(self, words: Words, operands: Operands, mask: Array) -> None:
        kind, comparison = words[-1].replace("b", "u"), words[1]
        x, y = self.value(operands[1], kind), self.value(operands[2], kind)
        unordered = np.isnan(x) | np.isnan(y) if kind[0] == "f" else np.zeros(self.count, bool)
        if comparison == "num":
            result = ~unordered
        elif comparison == "nan":
            result = unordered
        elif kind[0] == "f" and comparison.endswith("u"):
            result = _COMPARISONS[comparison[:-1]](x, y) | unordered
        else:
            result = _COMPARISONS[comparison](x, y) & ~unordered
        self.put(operands[0], result, mask)

    def do_selp(self, words: Words, operands: Operands, mask: Array) -> None:
        x, y = (self.bits(operand, int(words[-1][1:])) for operand in operands[1:3])
        self.put(operands[0], np.where(self.predicate(operands[3]), x, y), mask)

    def do_shfl(self, words: Words, operands: Operands, mask: Array) -> None:
        x, by = (self.bits(operand, 32).reshape(self.warps, 32) for operand in operands[1:3])
        by, lane = by.astype(np.int64), np.arange(32)[None, :]
        source = {"bfly": lane ^ by, "idx": by & 31, "down": lane + by, "up": lane - by}[words[2]]
        source = np.where((source >= 0) & (source < 32), source, lane)
        self.put(operands[0].split("|")[0], np.take_along_axis(x, source, axis=1).reshape(-1), mask)

    def do_redux(self, words: Words, operands: Operands, mask: Array) -> None:
        """redux.sync: one value for all lanes of a warp."""
        kind = words[-1]
        x = self.value(operands[1], kind).reshape(self.warps, 32)
        x = np.abs(x) if "abs" in words else x
        functions: dict[str, Any] = {
            "add": np.add,
            "min": np.fmin,
            "max": np.fmax,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
        }
        if "NaN" in words:
            functions |= {"min": np.minimum, "max": np.maximum}
        total = functions[words[2]].reduce(x, axis=1)
        self.put(operands[0], np.repeat(total, 32).astype(DTYPES[kind]), mask)
