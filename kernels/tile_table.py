"""The table of tile sizes: one to three tiles, best first, per kernel, kind of dtype, BLOCK_D and architecture.

A launch takes the first tile whose shared memory fits the device, unless another was measured to be faster there
(`tile_search`). The order comes from registers, spills and blocks per multiprocessor, which
`python -m anomem.kernels.ahead_of_time` reads from the compiled kernels. Not measured on a GPU yet:
`python -m benchmarks.tune` times every tile and proposes an order.

Too many warps compute parts of a product twice. On sm_90 a 64-row tile takes 4 warps and a 128-row tile 4 or 8; with
32 rows wgmma falls back to mma.sync. On sm_80 the warps split a backward product by columns, at least 8 columns each:
64x16 with 4 warps takes 80 instructions instead of 48.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """One configuration of a kernel."""

    rows: int
    """Size of the axis that a block owns, such as BLOCK_N of queries."""
    columns: int
    """Size of the axis that a block loops over, such as BLOCK_M of prototypes."""
    warps: int
    stages: int
    shared: int
    """Upper bound of the shared memory in KiB; `ahead_of_time` checks it."""

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        # Set explicitly: Triton's default of fused multiply-add changed between releases.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


Entry = tuple[str, str, int]
"""An entry of the table: (kernel without `_kernel`, kind of dtype, BLOCK_D); for the kinds see `kind_of`."""

ARCHITECTURES = (80, 86, 90, 100, 120)
"""Of the table. 86 stands for 8.6 and 8.9 (RTX 30, RTX 40, L4, L40), 120 for RTX 50: 100 KB of shared memory."""
_LIKE = {86: 80, 120: 86}
"""Where an entry has no tiles of its own for an architecture it takes those of another."""
MMA_SYNC = (80, 86, 120)
"""Architectures whose matrix instruction is mma.sync, which takes 16 rows a warp."""
# Small, so that small tensors cross tile borders and end in tails in the interpreter.
INTERPRETED = Tile(rows=32, columns=32, warps=4, stages=1, shared=0)

TABLE: dict[Entry, dict[int, tuple[Tile, ...]]] = {
    # Retrieval: queries × prototypes; for `retrieve_flash_prototype_sums` prototypes × queries. On sm_90 one stage at
    # d = 64: with two, ptxas serialises the products (C7515). Without an entry retrieval is chunked: see `retrieve`.
    ("retrieve_flash_forward", "half", 64): {
        80: (Tile(64, 64, 4, 2, 24), Tile(64, 128, 4, 2, 40)),
        90: (Tile(64, 128, 4, 1, 24), Tile(64, 64, 4, 1, 16)),
        100: (Tile(64, 128, 4, 2, 73), Tile(64, 64, 4, 2, 41)),
    },
    ("retrieve_flash_forward", "half", 128): {
        80: (Tile(64, 64, 4, 2, 56), Tile(128, 64, 8, 2, 64)),
        86: (Tile(64, 32, 4, 2, 44),),
        90: (Tile(64, 64, 4, 3, 112), Tile(64, 128, 4, 2, 144)),
        100: (Tile(64, 64, 4, 2, 81), Tile(64, 128, 4, 2, 145)),
    },
    ("retrieve_flash_forward", "half", 256): {
        80: (Tile(64, 32, 4, 2, 68),),
        90: (Tile(64, 32, 4, 3, 128),),
        100: (Tile(128, 64, 8, 2, 194), Tile(64, 32, 4, 2, 97)),
    },
    ("retrieve_flash_forward", "tf32", 64): {
        80: (Tile(64, 64, 4, 2, 48),),
        90: (Tile(64, 64, 4, 1, 48),),
        100: (Tile(64, 64, 4, 2, 81),),
    },
    ("retrieve_flash_forward", "tf32", 128): {
        80: (Tile(64, 32, 4, 2, 80),),
        90: (Tile(64, 64, 4, 2, 160),),
        100: (Tile(64, 64, 4, 2, 161),),
    },
    # Queries × prototypes, products over slices of BLOCK_D features.
    ("retrieve_chunked_weights", "half", 64): {
        80: (Tile(64, 64, 4, 3, 48),),
        86: (Tile(64, 64, 4, 2, 24),),
        90: (Tile(64, 128, 4, 3, 96), Tile(128, 128, 8, 3, 144)),
        100: (Tile(64, 64, 4, 3, 73),),
    },
    # Queries × all prototypes; the entry ends in BLOCK_M.
    ("retrieve_resident", "half", 64): {
        80: (Tile(64, 64, 4, 2, 24),),
        90: (Tile(64, 64, 4, 2, 32),),
        100: (Tile(128, 64, 8, 2, 49),),
    },
    ("retrieve_resident", "half", 128): {
        80: (Tile(64, 128, 4, 2, 40),),
        90: (Tile(128, 128, 8, 2, 64),),
        100: (Tile(128, 128, 8, 2, 73),),
    },
    ("retrieve_resident", "half", 256): {
        80: (Tile(64, 256, 8, 2, 72),),
        90: (Tile(128, 256, 8, 2, 96),),
        100: (Tile(128, 256, 8, 2, 137),),
    },
    ("retrieve_flash_query_gradient", "half", 64): {
        80: (Tile(64, 32, 4, 2, 24),),
        90: (Tile(64, 64, 4, 1, 32),),
        100: (Tile(64, 32, 4, 2, 37),),
    },
    ("retrieve_flash_query_gradient", "half", 128): {
        80: (Tile(32, 32, 4, 1, 32),),
        90: (Tile(64, 64, 4, 2, 96), Tile(64, 32, 4, 2, 64)),
        100: (Tile(64, 64, 4, 2, 113),),
    },
    ("retrieve_flash_prototype_sums", "half", 64): {
        80: (Tile(64, 64, 4, 2, 33), Tile(128, 64, 8, 2, 49)),
        90: (Tile(64, 64, 4, 2, 49), Tile(128, 64, 8, 2, 65)),
        100: (Tile(64, 64, 4, 2, 58),),
    },
    ("retrieve_flash_prototype_sums", "half", 128): {
        80: (Tile(64, 32, 4, 2, 53),),
        90: (Tile(64, 64, 4, 3, 130),),
        100: (Tile(64, 64, 4, 2, 114), Tile(128, 64, 8, 2, 146)),
    },
}

# NT-Xent and InfoNCE: owned × streamed rows, one tile each for sm_80, sm_90 and sm_100. The forward's entry with twice
# the longest whole row is for all rows that are loaded in slices; that of the chunked weights ends in their length.
_CONTRAST = {
    ("contrast_forward", "half", 64): (Tile(64, 64, 4, 2, 17), Tile(64, 64, 4, 3, 32), Tile(64, 64, 4, 2, 25)),
    ("contrast_forward", "half", 128): (Tile(64, 64, 4, 2, 33), Tile(64, 64, 4, 3, 64), Tile(64, 64, 4, 2, 49)),
    ("contrast_forward", "half", 256): (Tile(64, 32, 4, 2, 49), Tile(128, 64, 8, 3, 160), Tile(64, 64, 4, 2, 97)),
    ("contrast_forward", "half", 512): (
        Tile(64, 128, 4, 3, 48), Tile(128, 128, 8, 3, 97), Tile(128, 64, 8, 3, 73),
    ),
    ("contrast_forward", "tf32", 64): (Tile(64, 64, 4, 2, 33), Tile(64, 64, 4, 2, 48), Tile(64, 64, 4, 2, 49)),
    ("contrast_forward", "tf32", 128): (Tile(64, 32, 4, 2, 49), Tile(64, 64, 4, 2, 96), Tile(64, 64, 4, 2, 97)),
    ("contrast_forward", "tf32", 256): (Tile(64, 64, 4, 2, 16), Tile(64, 64, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("contrast_backward", "half", 64): (Tile(64, 32, 4, 2, 13), Tile(64, 64, 4, 2, 33), Tile(64, 32, 4, 2, 22)),
    ("contrast_backward", "half", 128): (Tile(32, 32, 4, 2, 25), Tile(64, 64, 4, 3, 80), Tile(64, 32, 4, 1, 32)),
    ("contrast_backward", "tf32", 64): (Tile(32, 32, 4, 2, 25), Tile(64, 32, 4, 2, 41), Tile(64, 32, 4, 3, 43)),
    ("contrast_chunked_weights", "half", 64): (
        Tile(64, 64, 4, 3, 32), Tile(64, 128, 4, 3, 72), Tile(64, 64, 4, 3, 64),
    ),
    ("contrast_chunked_weights", "tf32", 32): (
        Tile(64, 64, 4, 3, 32), Tile(64, 128, 4, 3, 72), Tile(64, 64, 4, 3, 64),
    ),
}  # fmt: skip
for _entry, _tiles in _CONTRAST.items():
    TABLE[_entry] = {architecture: (tile,) for architecture, tile in zip((80, 90, 100), _tiles, strict=True)}
TABLE["contrast_forward", "half", 512][86] = (Tile(64, 64, 4, 2, 16),)


def tiles_of(entry: Entry, architecture: int) -> tuple[Tile, ...]:
    """The table's tiles for an architecture, best first; empty where the table has no such entry."""
    tiles = TABLE.get(entry, {})
    if not tiles:
        return ()
    while architecture not in tiles:
        architecture = _LIKE[architecture]
    return tiles[architecture]


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The table's kind of dtype: "half" for bfloat16 and float16; the precision of products for float32."""
    return precision if dtype == torch.float32 else "half"


def fitting(entry: Entry, device: torch.device) -> tuple[Tile, ...]:
    """The table's tiles whose shared memory fits a device, best first; empty where the table has no such entry.

    Args:
        entry: of the table.
        device: of the kernel's tensors; any but a CUDA device means the interpreter.
    """
    if device.type != "cuda":
        return (INTERPRETED,) if entry in TABLE else ()
    return _fitting_gpu(entry, device)


def candidates(entry: Entry, device: torch.device) -> tuple[Tile, ...]:
    """The tiles that a search for the fastest tries: those of `fitting`, then their neighbours.

    Args:
        entry: of the table.
        device: of the kernel's tensors; the interpreter has one tile.
    """
    known = fitting(entry, device)
    if device.type != "cuda":
        return known
    near = [tile for one in known for tile in neighbours(entry, one, architecture_of(device))]
    found: dict[tuple[int, ...], Tile] = {}
    for tile in (*known, *near):
        found.setdefault((tile.rows, tile.columns, tile.warps, tile.stages), tile)
    return tuple(found.values())


def neighbours(entry: Entry, tile: Tile, architecture: int) -> Iterator[Tile]:
    """The tiles one step away: one stage more or less, columns or rows doubled or halved.

    Leaves out the tiles that the architecture compiles badly: see the top of this file. The others may still fail to
    compile, or spill. Their shared memory is not known (0).
    """
    kernel, kind, _ = entry
    yield from (tile._replace(stages=stages, shared=0) for stages in (tile.stages - 1, tile.stages + 1) if stages)
    fewest = 8 * tile.warps if kind != "ieee" and architecture in MMA_SYNC else 16
    if kernel != "retrieve_resident":  # whose columns are all prototypes
        for columns in (tile.columns // 2, tile.columns * 2):
            if fewest <= columns <= 128:
                yield tile._replace(columns=columns, shared=0)
    fewest = 64 if kind != "ieee" and architecture not in MMA_SYNC else 16
    for rows in (tile.rows // 2, tile.rows, tile.rows * 2):
        for warps in (8, 4) if rows == 128 else (4,):
            if fewest <= rows <= 128 and (rows, warps) != (tile.rows, tile.warps):
                yield tile._replace(rows=rows, warps=warps, shared=0)


def architecture_of(device: torch.device) -> int:
    """The architecture of the table whose tiles a GPU takes; 80 for the interpreter.

    11.x (Thor) has neither wgmma nor, in Triton, tensor memory: it takes the tiles of Ampere, as 12.x does.
    """
    return 80 if device.type != "cuda" else _architecture_of_gpu(device)


@functools.cache
def _architecture_of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return 86 if minor in (6, 9) else 80
    return {9: 90, 10: 100, 12: 120}.get(major, 80)


@functools.cache
def _fitting_gpu(entry: Entry, device: torch.device) -> tuple[Tile, ...]:
    limit = _device_properties(device)["max_shared_mem"] // 1024
    return tuple(tile for tile in tiles_of(entry, architecture_of(device)) if tile.shared <= limit)


def _device_properties(device: torch.device) -> dict[str, int]:
    index = device.index if device.index is not None else torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)
