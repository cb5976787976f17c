"""Global and shared memory, which refuse what a GPU leaves undefined.

Global: accesses out of bounds or misaligned, reads of what nobody wrote, writes to an input, two blocks that write
different bytes.

Shared: besides these, accesses of two warps without a barrier between them, reads of `cp.async` data before its wait,
operands of a matrix unit that were written after the last barrier or without the proxy fence, and writes to operands of
products in flight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.ptx.formats import Array

_SEGMENT = 36  # bits of an address within its array
_FIRST = 1 << 32  # so that a 32-bit offset below zero stays in the segment


class Fault(Exception):
    """The program does what PTX leaves undefined."""


class Segment(NamedTuple):
    """One array in global memory."""

    name: str
    array: Array
    bytes: Array
    writer: Array | None
    """Per byte the block that wrote it, 0 for none; None for an input."""


class GlobalMemory:
    """Arrays at made-up addresses."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def add(self, name: str, array: Array, *, output: bool = False) -> int:
        """Place an array; returns its address."""
        array = np.ascontiguousarray(array)
        content = array.reshape(-1).view(np.uint8)
        self._segments.append(Segment(name, array, content, np.zeros(content.size, np.int32) if output else None))
        return (len(self._segments) << _SEGMENT) + _FIRST

    def result(self, name: str) -> Array:
        """An output, of which every byte must have been written."""
        segment = next(segment for segment in self._segments if segment.name == name)
        assert segment.writer is not None
        missing = int((segment.writer == 0).sum())
        if missing:
            raise Fault(f"{missing} of {segment.writer.size} bytes of {name} were not written")
        return segment.array

    def read(self, addresses: Array, width: int, mask: Array) -> Array:
        """[T, width] bytes; zero where the mask is False."""
        data = np.zeros((len(addresses), width), np.uint8)
        if mask.any():
            segment, at = self._locate(addresses[mask], width)
            if segment.writer is not None and not segment.writer[at].all():
                raise Fault(f"reads {segment.name}, which nobody wrote")
            data[mask] = segment.bytes[at]
        return data

    def write(self, addresses: Array, data: Array, mask: Array, block: int) -> None:
        """Store [T, width] bytes for a block."""
        if not mask.any():
            return
        segment, at = self._locate(addresses[mask], data.shape[1])
        if segment.writer is None:
            raise Fault(f"writes the input {segment.name}")
        if ((segment.writer[at] != 0) & (segment.bytes[at] != data[mask])).any():
            raise Fault(f"{segment.name} is written twice with different values")
        segment.bytes[at] = data[mask]
        segment.writer[at] = block

    def _locate(self, addresses: Array, width: int) -> tuple[Segment, Array]:
        numbers = (addresses >> np.uint64(_SEGMENT)).astype(np.int64)
        if (numbers != numbers[0]).any() or not 1 <= numbers[0] <= len(self._segments):
            raise Fault(f"wild address {addresses[0]:#x}")
        segment = self._segments[numbers[0] - 1]
        offsets = (addresses & np.uint64((1 << _SEGMENT) - 1)).astype(np.int64) - _FIRST
        if (offsets < 0).any() or (offsets + width > segment.bytes.size).any():
            raise Fault(f"out of bounds in {segment.name}: byte {offsets.max()} or {offsets.min()}")
        if (offsets % width).any():
            raise Fault(f"misaligned access of {width} bytes in {segment.name}")
        return segment, offsets[:, None] + np.arange(width)


class SharedMemory:
    """Shared memory of one block; an epoch lies between two barriers.

    Args:
        size: in bytes.
        copies_need_fence: whether `cp.async` data needs a proxy fence before a matrix unit reads it. PTX demands it.
            Triton 3.6 does not set it.
    """

    def __init__(self, size: int, *, copies_need_fence: bool) -> None:
        self.size = size
        self._copies_need_fence = copies_need_fence
        self._epoch = 0
        self._bytes = np.full(size, 0xC5, np.uint8)
        self._written = np.zeros(size, bool)
        self._writer = np.full(size, -1, np.int16)  # the warp
        self._write_epoch = np.full(size, -1, np.int64)
        self._readers = np.zeros(size, np.uint64)  # a bit for each warp
        self._read_epoch = np.full(size, -1, np.int64)
        self._pending = np.zeros(size, bool)  # copied, not waited for
        self._fenced = np.ones(size, bool)
        self._in_flight = np.zeros(size, np.int16)  # products that still read a byte
        self._copies: list[list[Array]] = []
        self._open_copies: list[Array] = []

    def barrier(self) -> None:
        """All threads have arrived."""
        self._epoch += 1

    def fence(self) -> None:
        """Generic writes become visible to the asynchronous proxy."""
        self._fenced |= ~self._pending

    def commit(self) -> None:
        """End a group of copies."""
        self._copies.append(self._open_copies)
        self._open_copies = []

    def wait(self, left: int) -> None:
        """Wait until so many of the newest groups are unfinished."""
        finished = len(self._copies) - left
        for group in self._copies[: max(finished, 0)]:
            for at in group:
                self._pending[at] = False
                self._write_epoch[at] = self._epoch
        self._copies = self._copies[max(finished, 0) :]

    def read(self, addresses: Array, width: int, warps: Array, mask: Array) -> Array:
        """[T, width] bytes; zero where the mask is False."""
        data = np.zeros((len(addresses), width), np.uint8)
        if mask.any():
            at = self._locate(addresses[mask], width)
            owners = np.broadcast_to(warps[mask][:, None], at.shape)
            self._check_read(at)
            if ((self._write_epoch[at] == self._epoch) & (self._writer[at] != owners)).any():
                raise Fault("reads shared memory that another warp wrote after the last barrier")
            self._note_readers(at.reshape(-1), owners.reshape(-1))
            data[mask] = self._bytes[at]
        return data

    def write(self, addresses: Array, data: Array, warps: Array, mask: Array, *, copied: bool = False) -> None:
        """Store [T, width] bytes; `copied` by cp.async."""
        if not mask.any():
            return
        at = self._locate(addresses[mask], data.shape[1])
        owners = np.broadcast_to(warps[mask][:, None], at.shape)
        if self._in_flight[at].any():
            raise Fault("writes shared memory that a product in flight reads")
        if self._pending[at].any():
            raise Fault("writes over cp.async data in flight")
        readers = np.where(self._read_epoch[at] == self._epoch, self._readers[at], np.uint64(0))
        if (readers & ~(np.uint64(1) << owners.astype(np.uint64))).any():
            raise Fault("writes shared memory that another warp reads, without a barrier between")
        twice = (self._write_epoch[at] == self._epoch) & (self._writer[at] != owners)
        if (twice & (self._bytes[at] != data[mask])).any():
            raise Fault("two warps write different values without a barrier between")
        self._bytes[at] = data[mask]
        self._written[at] = True
        self._writer[at] = owners
        self._write_epoch[at] = self._epoch
        self._fenced[at] = copied and not self._copies_need_fence
        if copied:
            self._pending[at] = True
            self._open_copies.append(at.reshape(-1))

    def operand(self, addresses: Array, size: int) -> Array:
        """Read an operand of an asynchronous matrix unit, [..., size] bytes; it is in flight until `release`."""
        at = self._locate(addresses.reshape(-1), size).reshape(*addresses.shape, size)
        self._check_read(at)
        if (self._write_epoch[at] == self._epoch).any():
            raise Fault("a matrix unit reads what was written after the last barrier")
        if not self._fenced[at].all():
            raise Fault("a matrix unit reads generic writes without fence.proxy.async")
        self._in_flight[np.unique(at)] += 1
        return self._bytes[at]

    def release(self, addresses: Array, size: int) -> None:
        """The product that reads an operand has ended."""
        self._in_flight[np.unique(self._locate(addresses.reshape(-1), size))] -= 1

    def _check_read(self, at: Array) -> None:
        if not self._written[at].all():
            raise Fault("reads shared memory that nobody wrote")
        if self._pending[at].any():
            raise Fault("reads cp.async data before its wait")

    def _note_readers(self, at: Array, warps: Array) -> None:
        stale = self._read_epoch[at] != self._epoch
        self._readers[at[stale]] = 0
        self._read_epoch[at] = self._epoch
        for warp in np.unique(warps):
            self._readers[at[warps == warp]] |= np.uint64(1 << int(warp))

    def _locate(self, addresses: Array, width: int) -> Array:
        if (addresses % width).any():
            raise Fault("misaligned access of shared memory")
        if (addresses < 0).any() or (addresses + width > self.size).any():
            raise Fault(f"byte {addresses.max()} or {addresses.min()} of {self.size} bytes of shared memory")
        return addresses[:, None] + np.arange(width)
