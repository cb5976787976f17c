"""Good images in, verdicts and heat maps out: python examples/your_folder.py GOOD_FOLDER NEW_FOLDER OUTPUT_FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from anomem.cli.outputs import overlay, write_png
from anomem.data import image_files, read_image
from anomem.train import fit, load_detector, save_detector


def main(good: Path, new: Path, output: Path, alpha: float = 0.05) -> int:
    """Fit once, decide about every new image. Returns how many are anomalous."""
    run = output / "detector"
    if not run.exists():
        save_detector(fit(good, alpha=alpha), run)  # seconds; JSON and safetensors
    detector = load_detector(run)
    print(detector.calibration.promise(detector.alpha))

    found = 0
    for file in image_files(new):
        image = read_image(file)  # [3, H, W] uint8, upright
        scores, p_values, verdicts, maps = detector(image[None])
        called = bool(verdicts is not None and verdicts[0])
        found += called
        print(
            f"{file.name}\t{scores[detector.lead][0]:.3f}\tp {p_values[0]:.3f}\t{'anomalous' if called else 'normal'}"
        )
        if called:
            heat = maps["local"][0].cpu()  # [H, W]
            limit = float(torch.quantile(heat.flatten()[::5], 0.8))
            write_png(output / f"{file.stem}.png", overlay(image, heat, limit, float(heat.max())))
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
