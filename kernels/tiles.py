"""The table of tile sizes: per kernel, kind of dtype, BLOCK_D and architecture, one to three tiles, best first.

The first tile whose shared memory fits the device is taken, unless one was measured to be faster there (`tuning`). The
order comes from registers, spills and blocks per multiprocessor as `python -m anomem.kernels.inspect` reads them from
the compiled kernels; none of it was measured on a GPU yet: `python -m benchmarks.tune` does that and proposes another.
`shared` is an upper bound that the inspection checks.

Warps beyond what a product has work for compute parts of it twice. On sm_90 a 64-row tile takes 4 warps and a 128-row
tile 8, and with 32 rows wgmma falls back to mma.sync. On sm_80 a backward product is split among the warps by columns,
of which each takes at least 8 (64x16 with 4 warps: 80 instructions where 48 do).
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """One configuration of a kernel."""

    rows: int
    """The axis that a block owns: BLOCK_N of queries, say."""
    columns: int
    """The axis that a block loops over: BLOCK_M of prototypes, say."""
    warps: int
    stages: int
    shared: int
    """Upper bound of the shared memory in KiB."""

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch, and of an ahead-of-time compilation."""
        # Fused multiply-add is said aloud because Triton's default changes from release to release.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


Key = tuple[str, str, int]
"""(kernel, "half" for bfloat16 and float16 or "tf32" or "ieee" for float32, BLOCK_D)."""

ARCHITECTURES = (80, 90, 100)
# In the interpreter small tiles let small tensors cross tile borders and end in tails.
INTERPRETED = Tile(rows=32, columns=32, warps=4, stages=1, shared=0)

TABLE: dict[Key, dict[int, tuple[Tile, ...]]] = {
    # Retrieval: queries × prototypes; `retrieve_prototype_sums` prototypes × queries. On sm_90 one stage at d = 64:
    # with two, ptxas serialises the products (C7515). What has no tile here runs on the library's products: see
    # `retrieve`.
    ("retrieve_forward", "half", 64): {
        80: (Tile(64, 64, 4, 2, 24), Tile(64, 128, 4, 2, 40)),
        90: (Tile(64, 128, 4, 1, 24), Tile(64, 64, 4, 1, 16)),
        100: (Tile(64, 128, 4, 2, 73), Tile(64, 64, 4, 2, 41)),
    },
    ("retrieve_forward", "half", 128): {
        80: (Tile(64, 64, 4, 2, 56), Tile(128, 64, 8, 2, 64)),
        90: (Tile(64, 64, 4, 2, 80), Tile(64, 128, 4, 2, 144)),
        100: (Tile(64, 64, 4, 2, 81), Tile(64, 128, 4, 2, 145)),
    },
    ("retrieve_forward", "half", 256): {
        80: (Tile(64, 32, 4, 2, 68),),
        90: (Tile(64, 64, 4, 2, 160), Tile(128, 64, 8, 2, 192)),
        100: (Tile(128, 64, 8, 2, 194), Tile(64, 32, 4, 2, 97)),
    },
    ("retrieve_forward", "tf32", 64): {
        80: (Tile(64, 64, 4, 2, 48),),
        90: (Tile(64, 64, 4, 1, 48),),
        100: (Tile(64, 64, 4, 2, 81),),
    },
    ("retrieve_forward", "tf32", 128): {
        80: (Tile(64, 32, 4, 2, 80),),
        90: (Tile(64, 64, 4, 2, 160),),
        100: (Tile(64, 64, 4, 2, 161),),
    },
    # Queries × all prototypes; the key's last part is BLOCK_M.
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
    ("retrieve_query_gradient", "half", 64): {
        80: (Tile(64, 32, 4, 2, 24),),
        90: (Tile(64, 64, 4, 1, 32),),
        100: (Tile(64, 64, 4, 2, 57),),
    },
    ("retrieve_query_gradient", "half", 128): {
        80: (Tile(32, 32, 4, 1, 32),),
        90: (Tile(64, 64, 4, 2, 96), Tile(64, 32, 4, 2, 64)),
        100: (Tile(64, 64, 4, 2, 113),),
    },
    ("retrieve_prototype_sums", "half", 64): {
        80: (Tile(64, 64, 4, 2, 33), Tile(128, 64, 8, 2, 49)),
        90: (Tile(64, 64, 4, 2, 49), Tile(128, 64, 8, 2, 65)),
        100: (Tile(64, 64, 4, 2, 58),),
    },
    ("retrieve_prototype_sums", "half", 128): {
        80: (Tile(64, 32, 4, 2, 53),),
        90: (Tile(64, 64, 4, 2, 97),),
        100: (Tile(64, 64, 4, 2, 114), Tile(128, 64, 8, 2, 146)),
    },
}

# nt_xent and info_nce: owned × streamed rows. Twice the longest whole row stands for all rows that are read in slices.
_CONTRAST = {
    ("contrast_forward", "half", 64): (Tile(64, 64, 4, 2, 17), Tile(64, 64, 4, 2, 24), Tile(64, 64, 4, 2, 25)),
    ("contrast_forward", "half", 128): (Tile(64, 64, 4, 2, 33), Tile(64, 64, 4, 2, 48), Tile(64, 64, 4, 2, 49)),
    ("contrast_forward", "half", 256): (Tile(64, 32, 4, 2, 49), Tile(64, 64, 4, 2, 96), Tile(64, 64, 4, 2, 97)),
    ("contrast_forward", "half", 512): (Tile(64, 64, 4, 2, 16), Tile(64, 64, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("contrast_forward", "tf32", 64): (Tile(64, 64, 4, 2, 33), Tile(64, 64, 4, 2, 48), Tile(64, 64, 4, 2, 49)),
    ("contrast_forward", "tf32", 128): (Tile(64, 32, 4, 2, 49), Tile(64, 64, 4, 2, 96), Tile(64, 64, 4, 2, 97)),
    ("contrast_forward", "tf32", 256): (Tile(64, 64, 4, 2, 16), Tile(64, 64, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("contrast_forward", "ieee", 64): (Tile(32, 16, 4, 1, 20),) * 3,
    ("contrast_forward", "ieee", 128): (Tile(32, 16, 4, 1, 7),) * 3,
    ("contrast_backward", "half", 64): (Tile(64, 32, 4, 2, 13), Tile(64, 64, 4, 2, 33), Tile(64, 32, 4, 2, 21)),
    ("contrast_backward", "half", 128): (Tile(32, 32, 4, 2, 19), Tile(64, 32, 4, 2, 50), Tile(64, 32, 4, 1, 25)),
    ("contrast_backward", "half", 256): (Tile(32, 64, 4, 2, 20), Tile(64, 32, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("contrast_backward", "tf32", 64): (Tile(32, 32, 4, 2, 25), Tile(64, 32, 4, 2, 41), Tile(64, 32, 4, 3, 42)),
    ("contrast_backward", "tf32", 128): (Tile(64, 32, 4, 2, 25), Tile(64, 32, 4, 2, 32), Tile(64, 32, 4, 2, 32)),
    ("contrast_backward", "ieee", 64): (Tile(16, 32, 4, 1, 14), Tile(16, 32, 4, 1, 14), Tile(16, 16, 4, 1, 9)),
    ("contrast_backward", "ieee", 128): (Tile(32, 32, 8, 1, 12), Tile(32, 32, 8, 1, 12), Tile(16, 16, 4, 1, 5)),
}
for _key, _tiles in _CONTRAST.items():
    TABLE[_key] = {architecture: (tile,) for architecture, tile in zip(ARCHITECTURES, _tiles, strict=True)}


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """How the table names the operands' dtype."""
    return precision if dtype == torch.float32 else "half"


def fitting(entry: Key, device: torch.device) -> tuple[Tile, ...]:
    """The table's tiles whose shared memory fits a device, best first; none where it has none.

    Args:
        entry: of the table.
        device: where the kernel runs; a CPU device means the interpreter.
    """
    return (INTERPRETED,) if device.type == "cpu" else _fitting_gpu(entry, device)


def candidates(entry: Key, device: torch.device) -> tuple[Tile, ...]:
    """What a search for the fastest tile tries: those of `fitting`, then their neighbours.

    Args:
        entry: of the table.
        device: where the kernel runs; the interpreter has one tile and nothing to search.
    """
    known = fitting(entry, device)
    if device.type == "cpu":
        return known
    near = [tile for one in known for tile in neighbours(entry, one, architecture_of(device))]
    found: dict[tuple[int, ...], Tile] = {}
    for tile in (*known, *near):
        found.setdefault((tile.rows, tile.columns, tile.warps, tile.stages), tile)
    return tuple(found.values())


def neighbours(entry: Key, tile: Tile, architecture: int) -> Iterator[Tile]:
    """The tiles one step away: one stage more or less, columns or rows doubled or halved.

    Not among them is what the architecture is known to compile badly, see the top of this file. Whether one compiles,
    and without spills, is seen when it is tried: their shared memory is not known (0).
    """
    kernel, kind, _ = entry
    yield from (tile._replace(stages=stages, shared=0) for stages in (tile.stages - 1, tile.stages + 1) if stages)
    fewest = 8 * tile.warps if kind != "ieee" and architecture == 80 else 16
    if kernel != "retrieve_resident":  # whose columns are all prototypes
        for columns in (tile.columns // 2, tile.columns * 2):
            if fewest <= columns <= 128:
                yield tile._replace(columns=columns, shared=0)
    fewest = 64 if kind != "ieee" and architecture != 80 else 16
    for rows in (tile.rows // 2, tile.rows * 2):
        if fewest <= rows <= 128:
            yield tile._replace(rows=rows, warps=8 if rows == 128 else 4, shared=0)


def architecture_of(device: torch.device) -> int:
    """The row of the table that a GPU takes."""
    # Consumer Blackwell (12.x) has neither wgmma nor tensor memory: it takes the tiles of Ampere.
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


@functools.cache
def _fitting_gpu(entry: Key, device: torch.device) -> tuple[Tile, ...]:
    limit = _device_properties(device)["max_shared_mem"] // 1024
    return tuple(tile for tile in TABLE.get(entry, {}).get(architecture_of(device), ()) if tile.shared <= limit)


def _device_properties(device: torch.device) -> dict[str, int]:
    index = device.index if device.index is not None else torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)
