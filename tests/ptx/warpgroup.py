"""wgmma (sm_90): products of four warps, whose operands lie in shared memory behind descriptors.

A product is computed when it is issued. Its operands stay in flight until their group is waited for.
PTX ISA, "Asynchronous warpgroup level matrix instructions": descriptors, swizzles and fragments.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.formats import READERS, Array, from_bytes
from tests.ptx.matrix import ACCUMULATOR, MatrixUnit
from tests.ptx.memory import Fault
from tests.ptx.threads import Operands, Words

_ROW, _PAIR, _SINGLE = np.arange(32) // 4, np.arange(32) % 4 * 2, np.arange(32) % 4
_SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}
_Held = list[tuple[Array, int]]


def swizzled(address: Array, swizzle: int) -> Array:
    """The address at which a swizzle of so many bytes puts a byte."""
    return address ^ ((address >> 7 & (swizzle // 16 - 1)) << 4) if swizzle > 16 else address


def operand_addresses(descriptor: int, swizzle: int, along_depth: bool, rows: int, depth: int, size: int) -> Array:
    """Byte addresses [rows, depth] of an operand.

    Args:
        descriptor: 64 bits: the start and two strides, each without its last four bits.
        swizzle: bytes of a row of the layout; 16 without one.
        along_depth: whether elements that are adjacent in memory differ in depth, not in row.
        rows: of the operand (M or N).
        depth: K.
        size: bytes of an element.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if along_depth:
        byte, lines = k * size, row // 8 * stride + row % 8 * swizzle
    else:
        byte, lines = row * size, k // 8 * stride + k % 8 * swizzle
    return swizzled(start + lines + byte % swizzle + byte // swizzle * leading, swizzle)


class WarpGroup(MatrixUnit):
    """wgmma and its groups."""

    def do_wgmma(self, words: Words, operands: Operands, mask: Array) -> None:
        if words[1] == "fence":
            return
        if words[1] == "commit_group":
            self._groups().append(self._open())
            self._open_products: _Held = []
        elif words[1] == "wait_group":
            groups = self._groups()
            for _ in range(len(groups) - int(operands[0])):
                for addresses, size in groups.pop(0):
                    self.shared.release(addresses, size)
        else:
            self._multiply(words, operands, mask)

    def _groups(self) -> list[_Held]:
        if not hasattr(self, "_committed"):
            self._committed: list[_Held] = []
        return self._committed

    def _open(self) -> _Held:
        if not hasattr(self, "_open_products"):
            self._open_products = []
        return self._open_products

    def _multiply(self, words: Words, operands: Operands, mask: Array) -> None:
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", words[4])
        assert shape is not None, words
        columns, depth, kind = int(shape[1]), int(shape[2]), words[6]
        size = 4 if kind == "tf32" else 2
        in_registers = operands[1].startswith("{")
        accumulate, flags = operands[3], [int(flag) for flag in operands[6:]]
        transposed = (0, *flags) if in_registers else tuple(flags)
        a_transposed, b_transposed = (*transposed, 0, 0)[:2]
        if in_registers:
            a = self._from_registers(self.listed(operands[1]), kind, depth)
        else:
            a = self._from_shared(operands[1], not a_transposed, 64, depth, kind, size)
        b = self._from_shared(operands[2], not b_transposed, columns, depth, kind, size)
        product = np.einsum("gmk,gnk->gmn", a.astype(np.float64), b.astype(np.float64))
        keeps = (
            self.predicate(accumulate) if accumulate.startswith("%") else self.all * (accumulate not in ("0", "false"))
        )
        if keeps.any() != keeps.all():
            raise Fault("scale-d differs between threads")
        results = self.listed(operands[0])
        for i in range(columns // 8):
            for j, (row, column) in enumerate(ACCUMULATOR):
                rows = 16 * np.arange(4)[:, None] + _ROW[None, :] + row  # [4 warps, 32]
                part = product[:, rows, 8 * i + _PAIR[None, :] + column].reshape(-1)
                register = results[4 * i + j]
                part = part + self.value(register, "f32") if keeps.all() else part
                self.put(register, part.astype(np.float32), mask)

    def _from_registers(self, registers: list[str], kind: str, depth: int) -> Array:
        """[warpgroups, 64, depth] float32."""
        a = np.zeros((self.warps // 4, 64, depth), np.float32)
        rows = 16 * np.arange(4)[:, None] + _ROW[None, :]  # [4 warps, 32]
        for register, (row, half) in zip(registers, ((0, 0), (8, 0), (0, 1), (8, 1)), strict=True):
            bits = np.ascontiguousarray(self.bits(register, 32).reshape(-1, 4, 32))
            if kind == "tf32":
                a[:, rows + row, _SINGLE[None, :] + 4 * half] = READERS[kind](bits)
            else:
                for step in (0, 1):
                    values = READERS[kind]((bits >> np.uint32(16 * step) & 0xFFFF).astype(np.uint16))
                    a[:, rows + row, _PAIR[None, :] + 8 * half + step] = values
        return a

    def _from_shared(self, operand: str, along_depth: bool, rows: int, depth: int, kind: str, size: int) -> Array:
        """[warpgroups, rows, depth] float32; in flight from now on."""
        descriptors = self.bits(operand, 64).reshape(-1, 128)
        if (descriptors != descriptors[:, :1]).any():
            raise Fault("a descriptor differs within a warpgroup")
        matrices = []
        for descriptor in map(int, descriptors[:, 0]):
            addresses = operand_addresses(descriptor, _SWIZZLE[descriptor >> 62], along_depth, rows, depth, size)
            matrices.append(READERS[kind](from_bytes(self.shared.operand(addresses, size), size)))
            self._open().append((addresses, size))
        return np.stack(matrices)
