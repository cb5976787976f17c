"""Deviation maps as files."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from anomem.data import read_image
from anomem.errors import UserError
from anomem.files import write_atomically, writing


class MapFiles:
    """One .tiff of float32 for each image: in a folder, laid out as the images are.

    Args:
        folder: of the maps.
        images: the image files.

    Raises:
        UserError: two images differ in nothing but their suffix, so that their maps would be one file.
    """

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.images = images
        absolute = [path.absolute() for path in images]
        common = os.path.commonpath([path.parent for path in absolute])
        self.files = [(folder / path.relative_to(common)).with_suffix(".tiff") for path in absolute]
        ((file, count),) = Counter(self.files).most_common(1)
        if count > 1:
            raise UserError(f"`--maps`: expected images of different names, received {count} whose map would be {file}")

    def write(self, place: int, deviation: Tensor) -> None:
        """Write one map at the size of its image.

        Args:
            place: which image.
            deviation: [H, W] on the CPU.
        """
        from PIL import Image

        size = read_image(self.images[place]).shape[1:]
        drawn = F.interpolate(deviation[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        buffer = io.BytesIO()
        Image.fromarray(drawn.numpy()).save(buffer, format="TIFF")
        file = self.files[place]
        with writing(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())
