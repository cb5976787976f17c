"""Settings of a task: the data set, its normal class and the split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anomem.validation import require, require_choice, require_count, require_pair, require_setting

Dataset = Literal["digits", "textures", "cifar10", "cifar100", "folder", "elpv"]
Defect = Literal["scratch", "blot", "cut_paste"]
Anomalies = Literal["photographs", "defects", Defect]
Levels = tuple[float, float]
"""Values of black and white."""
MEGAPIXELS = 178
"""Default of `DataConfig.max_megapixels`; Pillow's own limit."""
MOST = {
    "image_size": 16384,
    "train_patches": 10**6,
    "test_patches": 10**6,
    "workers": 256,
    "max_megapixels": 10**6,
}
"""Upper bounds of settings, far above useful values: a larger one is a typing error that would fill the machine."""


@dataclass(frozen=True)
class DataConfig:
    """One anomaly-detection task: a data set, its normal class and the split.

    Raises:
        ArgumentError: a number outside of its range, or an unknown name of anomalies.
    """

    dataset: str = "digits"
    """digits, textures, cifar10, cifar100, folder or elpv (solar cells under CC BY-NC-SA 4.0).
    A task made in Python may have any name."""
    root: str = "data"
    """Folder with the files of cifar10, cifar100 and folder; digits and textures need none."""
    normal: str = "0"
    """The normal class by name or by index: "3", "brick", "airplane".
    folder: by name; a single one in train/ needs none."""
    image_size: int | tuple[int, int] | None = None
    """Side of a square in pixels, or height and width.
    None is the data set's own: digits 16, textures 64, CIFAR 32, folder and elpv 128."""
    letterbox: bool = False
    """folder: keep the aspect ratio; border pixels are repeated around the image. Else images are stretched."""
    outlier_ratio: float = 0.0
    """Labelled anomalies in training as a ratio of the normals; 0 is the one-class setting."""
    test_fraction: float = 0.3
    """Share of each class (digits) or of the photograph (textures) kept for testing; the others bring test images."""
    seed: int = 0
    """Of the split and of every random choice in the data."""
    anomalies: Anomalies = "photographs"
    """textures: patches of other photographs, or local defects with pixel masks (defects: the three kinds in turn)."""
    train_patches: int = 400
    """textures: normal patches to train on."""
    test_patches: int = 150
    """textures: normal patches to test on; as many anomalous ones are added."""
    grey: bool = False
    """folder: read the images in grey."""
    levels: Levels | None = None
    """Values that become black and white in images of more than 8 bits: 0 4095 for a camera of 12 bits.
    None: 0 and 65535, in floating images 0 and 1. Values outside are clipped."""
    max_megapixels: int = MEGAPIXELS
    """Larger image files are refused: a small file can hold an image that fills the memory."""
    aligned: bool | None = None
    """Whether a position means the same in every image; None is the data set's own answer (textures: no)."""
    resident_megabytes: int = 2048
    """Image sets up to this size are kept on the device; larger ones are read while training."""
    workers: int = 2
    """Processes that read larger sets; 0 reads in the main process."""

    def __post_init__(self) -> None:
        size = self.image_size
        require(not isinstance(size, tuple) or len(size) == 2, "data.image_size", "a side, or height and width", size)
        for side in size if isinstance(size, tuple) else (size,):
            if side is not None:
                require_count(side, "data.image_size", 1)
        ratio, fraction = self.outlier_ratio, self.test_fraction
        require_setting(ratio, "data.outlier_ratio")
        require_setting(fraction, "data.test_fraction")
        require(ratio >= 0, "data.outlier_ratio", "a ratio ≥ 0 of labelled anomalies to normals", ratio)
        require(0 < fraction < 1, "data.test_fraction", "a fraction between 0 and 1", fraction)
        require_choice(self.anomalies, "data.anomalies", get_args(Anomalies))
        require_count(self.train_patches, "data.train_patches", 2)
        require_count(self.test_patches, "data.test_patches", 1)
        require_count(self.resident_megabytes, "data.resident_megabytes", 0)
        require_count(self.workers, "data.workers", 0)
        require_count(self.max_megapixels, "data.max_megapixels", 1)
        for name, most in MOST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                require(number is None or number <= most, f"data.{name}", f"at most {most}", number)
        seed = self.seed
        require(isinstance(seed, int) and abs(seed) < 2**63, "data.seed", "an integer of 64 bits", seed)
        for name in ("dataset", "root", "normal"):
            value = getattr(self, name)
            require(isinstance(value, str) and "\0" not in value, f"data.{name}", "a text without NUL", repr(value))
        if self.levels is not None:
            require_pair(self.levels, "data.levels", "two numbers, black < white")
            require(self.levels[0] < self.levels[1], "data.levels", "two numbers, black < white", self.levels)
