"""Folders of images in the layouts that the sweeps read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes: "bolt" in MVTec-AD's layout, "nut" in VisA's; defects are white squares, masks show them."""
    random = np.random.default_rng(0)

    def image(path: Path, defect: bool) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(90, 130, (64, 64, 3), dtype=np.uint8)
        if defect:
            pixels[20:40, 24:44] = 255
        Image.fromarray(pixels).save(path)
        return path

    def mask(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((64, 64), dtype=np.uint8)
        pixels[20:40, 24:44] = 255
        Image.fromarray(pixels).save(path)

    root = tmp_path / "parts"
    for i in range(8):
        image(root / "bolt" / "train" / "good" / f"{i}.png", False)
        image(root / "nut" / "Data" / "Images" / "Normal" / f"{i:03}.png", False)
    for i in range(3):
        image(root / "bolt" / "test" / "good" / f"{i}.png", False)
        image(root / "bolt" / "test" / "scratch" / f"{i}.png", True)
        mask(root / "bolt" / "ground_truth" / "scratch" / f"{i}_mask.png")
        image(root / "nut" / "Data" / "Images" / "Anomaly" / f"{i:03}.png", True)
        mask(root / "nut" / "Data" / "Masks" / "Anomaly" / f"{i:03}.png")
    return root
