"""The table of tile sizes: per kernel, kind of dtype, BLOCK_D and architecture, two or three tiles, best first.

The first tile whose shared memory fits the device is taken. The order comes from registers, spills and blocks per
multiprocessor as `python -m anomem.kernels.inspect` reads them from the compiled kernels; none of it was measured on a
GPU yet. `shared` is an upper bound that the same command checks.

A 64-row tile takes 4 warps and a 128-row tile 8: 64 rows with 8 warps compute the first product twice, and 32 rows
fall from wgmma to mma.sync.
"""

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

TABLE: dict[Key, dict[int, tuple[Tile, ...]]] = {}

# nt_xent and info_nce. Twice the longest whole row stands for all rows that are read in slices.
_CONTRAST = {
    ("contrast_forward", "half"): ((64, 128, 256, 512), Tile(64, 64, 4, 2, 100)),
    ("contrast_backward", "half"): ((64, 128, 256), Tile(64, 64, 4, 2, 70)),
    ("contrast_forward", "tf32"): ((64, 128, 256), Tile(64, 64, 4, 2, 100)),
    ("contrast_backward", "tf32"): ((64, 128), Tile(64, 32, 4, 2, 70)),
    ("contrast_forward", "ieee"): ((64, 128), Tile(32, 32, 4, 1, 70)),
    ("contrast_backward", "ieee"): ((64, 128), Tile(32, 32, 4, 1, 70)),
}
for (_kernel, _kind), (_widths, _tile) in _CONTRAST.items():
    TABLE |= {(_kernel, _kind, width): dict.fromkeys(ARCHITECTURES, (_tile,)) for width in _widths}


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """How the table names the operands' dtype."""
    return precision if dtype == torch.float32 else "half"


def tile_for(kernel: str, kind: str, block_d: int, device: torch.device) -> Tile | None:
    """The tile a launch uses, or None where the table has none that fits the device.

    Args:
        kernel: its name in the table.
        kind: from `kind_of`.
        block_d: BLOCK_D.
        device: where it runs; a CPU device means the interpreter.
    """
    if device.type == "cpu":
        return INTERPRETED
    architecture, limit = _device(device)
    for tile in TABLE.get((kernel, kind, block_d), {}).get(architecture, ()):
        if tile.shared <= limit:
            return tile
    return None


def _device(device: torch.device) -> tuple[int, int]:
    """(row of the table, shared memory in KiB that one block may use)."""
    target = triton.runtime.driver.active.utils.get_device_properties(
        device.index if device.index is not None else torch.cuda.current_device()
    )
    major = torch.cuda.get_device_capability(device)[0]
    # Consumer Blackwell (12.x) has neither wgmma nor tensor memory: it takes the tiles of Ampere.
    return {9: 90, 10: 100}.get(major, 80), target["max_shared_mem"] // 1024
