"""The matrix instructions of a warp: mma, ldmatrix and stmatrix.

PTX ISA, "Matrix multiply-accumulate operation using mma instruction": which thread holds which element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tests.ptx.formats import READERS, Array, from_bytes
from tests.ptx.threads import Operands, Threads, Words

# Row and first column, in the 8 × 8 matrix of ldmatrix and in the 16 × 8 one of an accumulator, of each lane.
_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4 * 2
# (row, column) offsets of the registers of an accumulator and of operands A and B of 16 and of 32 bits.
ACCUMULATOR = ((0, 0), (0, 1), (8, 0), (8, 1))
_A16, _A32 = ((0, 0), (8, 0), (0, 8), (8, 8)), ((0, 0), (8, 0), (0, 4), (8, 4))
_B16, _B32 = ((0, 0), (8, 0)), ((0, 0), (4, 0))


class MatrixUnit(Threads):
    """Instructions that a warp executes together."""

    def do_ldmatrix(self, words: Words, operands: Operands, mask: Array) -> None:
        addresses = self.address(operands[1], 32).reshape(self.warps, 32)
        registers = self.listed(operands[0])
        for i in range(_matrices(words)):
            rows = addresses[:, 8 * i : 8 * i + 8].reshape(-1)  # [warps · 8]
            warps = np.repeat(np.arange(self.warps), 8)
            data = self.shared.read(rows, 16, warps, np.ones(len(rows), bool))
            matrix = from_bytes(data.reshape(self.warps, 8, 8, 2), 2).astype(np.uint32)
            matrix = matrix.transpose(0, 2, 1) if "trans" in words else matrix
            pairs = matrix[:, _ROW, _COLUMN] | (matrix[:, _ROW, _COLUMN + 1] << 16)
            self.put(registers[i], pairs.reshape(-1), mask)

    def do_stmatrix(self, words: Words, operands: Operands, mask: Array) -> None:
        addresses = self.address(operands[0], 32)
        for i, register in enumerate(self.listed(operands[1])[: _matrices(words)]):
            pairs = self.bits(register, 32).reshape(self.warps, 32)
            matrix = np.zeros((self.warps, 8, 8), np.uint16)
            matrix[:, _ROW, _COLUMN], matrix[:, _ROW, _COLUMN + 1] = pairs & 0xFFFF, pairs >> 16
            matrix = matrix.transpose(0, 2, 1) if "trans" in words else matrix
            # Lane 8 i + j writes row j.
            writers = np.zeros((self.warps, 32), bool)
            writers[:, 8 * i : 8 * i + 8] = True
            data = np.zeros((self.warps, 32, 16), np.uint8)
            data[:, 8 * i : 8 * i + 8] = np.ascontiguousarray(matrix).view(np.uint8)
            self.shared.write(addresses, data.reshape(-1, 16), self.warp, writers.reshape(-1) & mask)

    def do_mma(self, words: Words, operands: Operands, mask: Array) -> None:
        kind = next(word for word in words if word in READERS)
        expected = {"m16n8k8"} if kind == "tf32" else {"m16n8k16"}
        if not expected & set(words):
            raise NotImplementedError(".".join(words))
        depth = 8 if kind == "tf32" else 16
        results, a_registers, b_registers, c_registers = map(self.listed, operands)
        a = np.zeros((self.warps, 16, depth), np.float32)
        b = np.zeros((self.warps, depth, 8), np.float32)
        of_a, of_b = _offsets(kind, _A16, _A32), _offsets(kind, _B16, _B32)
        for (values, step), (row, column) in zip(self._fragments(a_registers, kind), of_a, strict=True):
            a[:, _ROW + row, self._column(kind) + column + step] = values
        for (values, step), (row, column) in zip(self._fragments(b_registers, kind), of_b, strict=True):
            b[:, self._column(kind) + row + step, _ROW + column] = values
        total = a.astype(np.float64) @ b.astype(np.float64)
        for (row, column), source, target in zip(ACCUMULATOR, c_registers, results, strict=True):
            part = total[:, _ROW + row, _COLUMN + column].reshape(-1) + self.value(source, "f32")
            self.put(target, part.astype(np.float32), mask)

    def _fragments(self, registers: list[str], kind: str) -> Iterator[tuple[Array, int]]:
        """(values [warps, 32], offset within the pair) of each register of an operand, twice for 16 bits."""
        for register in registers:
            bits = self.bits(register, 32).reshape(self.warps, 32)
            if kind == "tf32":
                yield READERS[kind](np.ascontiguousarray(bits)), 0
            else:
                for step in (0, 1):
                    yield READERS[kind](((bits >> np.uint32(16 * step)) & 0xFFFF).astype(np.uint16)), step

    @staticmethod
    def _column(kind: str) -> Array:
        """First column of each lane in an operand."""
        return np.arange(32) % 4 if kind == "tf32" else _COLUMN


def _offsets(
    kind: str, of_16: tuple[tuple[int, int], ...], of_32: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int]]:
    """Offsets of each value that `_fragments` gives."""
    for offset in of_32 if kind == "tf32" else of_16:
        yield from (offset,) if kind == "tf32" else (offset, offset)


def _matrices(words: Words) -> int:
    """How many 8 × 8 matrices an instruction moves."""
    return int(next(word for word in words if re.fullmatch(r"x\d", word))[1:])
