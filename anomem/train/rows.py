"""Which rows of a batch are encoded where: shares of processes, parts, micro-batches; and the seeds of random numbers.

Random numbers depend on the seed, the step and the row's place in the batch alone. A training therefore draws the same
ones whatever the number of processes and the size of the micro-batches, and needs no state to be resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch

BLOCK = 64
"""Rows whose random numbers come from one seed. A process that has a part of a block draws the whole block."""
AUGMENT, OUTLIERS, POSITIONS, FILL, DROPOUT, ORDER = range(6)
"""What random numbers are for; the first number of a key."""


def seed_of(*key: int) -> int:
    """A seed for a purpose, a step and a place.

    Hashed: torch's CPU generator reads the lower 32 bits of a seed only, so that keys packed into 63 bits would meet.
    """
    digest = hashlib.blake2b(b"".join(number.to_bytes(8, "little") for number in key), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Draws:
    """The random generators of a stage. Each is seeded by its purpose, the step and the place of what it draws.

    Args:
        device: of the random numbers.
        seed: of the stage.

    Example:
        >>> draws = Draws(model.device, seed=0)
        >>> draws.begin(step)
        >>> uniform = torch.rand(64, generator=draws(AUGMENT, view, block), device=model.device)
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed, self.step = device, seed, 0
        self.shared = torch.Generator(device)
        self.separate: dict[tuple[int, ...], torch.Generator] | None = None
        """A generator for each purpose and place, where a CUDA graph draws: within one none can be seeded."""

    def begin(self, step: int) -> None:
        """Of a step: 0 … steps − 1."""
        self.step = step
        for key, generator in (self.separate or {}).items():
            generator.manual_seed(self._seed(*key))

    def __call__(self, purpose: int, *place: int) -> torch.Generator:
        """The generator of a purpose and a place, at its first number."""
        if self.separate is None:
            return self.shared.manual_seed(self._seed(purpose, *place))
        key = (purpose, *place)
        if key not in self.separate:
            self.separate[key] = torch.Generator(self.device).manual_seed(self._seed(*key))
        return self.separate[key]

    def dropout(self, *place: int) -> AbstractContextManager[None]:
        """Around the encoder: `seeded`, unless a CUDA graph draws, which is seeded as a whole."""
        return self.seeded(*place) if self.separate is None else nullcontext()

    @contextmanager
    def seeded(self, *place: int) -> Iterator[None]:
        """Dropout draws from torch's own generators, within this block the same for the same place.

        Each process draws its own: of all random numbers these alone depend on the number of processes.
        """
        gpus = [self.device] if self.device.type == "cuda" else []
        seed = self._seed(DROPOUT, *place)
        with torch.random.fork_rng(gpus):
            torch.default_generator.manual_seed(seed)
            for device in gpus:
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            yield

    def _seed(self, purpose: int, *place: int) -> int:
        return seed_of(purpose, self.seed, self.step, *place)


def shares(count: int, parts: int) -> list[range]:
    """`count` things in contiguous parts whose sizes differ by at most one."""
    cuts = [count * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(cuts)]


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: of its images, and of its synthetic outliers, which come after all images.

    Attributes:
        images: places of the images in the batch.
        outliers: numbers of the outliers; outlier j is made of image j mod b.
        batch: b, images of the whole batch.
        synthetic: outliers of the whole batch.
    """

    images: range
    outliers: range
    batch: int
    synthetic: int

    @classmethod
    def of(cls, batch: int, ratio: float) -> Rows:
        """All rows of a batch with so many synthetic outliers per image."""
        # At least one, as with labelled anomalies: stage 2 learns nothing from a batch without.
        synthetic = max(1, round(ratio * batch)) if ratio > 0 else 0
        return cls(range(batch), range(synthetic), batch, synthetic)

    def __len__(self) -> int:
        return len(self.images) + len(self.outliers)

    def split(self, parts: int) -> list[Rows]:
        """Contiguous parts whose numbers of images, and of outliers, differ by at most one."""
        cuts = zip(shares(len(self.images), parts), shares(len(self.outliers), parts), strict=True)
        return [
            Rows(self.images[i.start : i.stop], self.outliers[o.start : o.stop], self.batch, self.synthetic)
            for i, o in cuts
        ]

    @property
    def pieces(self) -> tuple[range, range]:
        """Places of the rows in the whole batch: those of images, then those of outliers."""
        return self.images, range(self.batch + self.outliers.start, self.batch + self.outliers.stop)

    def outlier_blocks(self) -> list[range]:
        """The blocks that the outliers are in; one is made as a whole, its random numbers come from one seed."""
        if not self.outliers:
            return []
        first, last = self.outliers.start // BLOCK, (self.outliers.stop - 1) // BLOCK
        return [range(k * BLOCK, min((k + 1) * BLOCK, self.synthetic)) for k in range(first, last + 1)]

    def sources(self) -> list[int]:
        """Places of the images that are needed: those of the rows, then others for whole blocks of outliers."""
        needed = dict.fromkeys(self.images)
        needed.update(dict.fromkeys(j % self.batch for block in self.outlier_blocks() for j in block))
        return list(needed)


def blocks(piece: range) -> list[tuple[int, range]]:
    """The blocks that a contiguous piece of a batch meets: of each the number, and the piece's places within it."""
    found = []
    for number in range(piece.start // BLOCK, -(-piece.stop // BLOCK) if len(piece) else 0):
        start, stop = max(piece.start, number * BLOCK), min(piece.stop, (number + 1) * BLOCK)
        found.append((number, range(start - number * BLOCK, stop - number * BLOCK)))
    return found
