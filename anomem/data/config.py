"""Which images, which class is normal, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass

from anomem.validation import require_count


@dataclass
class DataConfig:
    """One anomaly-detection task: a data set, its normal class and the split.

    Attributes:
        dataset: "digits", "textures", "cifar10", "cifar100" or "folder".
        root: folder that holds the files of cifar10, cifar100 and folder; digits and textures need none.
        normal: the normal class by name or by index ("3", "brick", "airplane", "0"). `folder` with a single folder in
            `train` takes that one.
        image_size: side in pixels, square; None is the data set's own (digits 16, textures 64, CIFAR 32, folder 128).
        outlier_ratio: labelled anomalies in training as a ratio of the normals; 0 is the one-class setting.
        test_fraction: share of each class (digits) or of the photograph (textures) kept for testing. CIFAR and folder
            bring their own test images.
        seed: of the split and of everything drawn for it.
        anomalies: for textures: "photographs" (patches of other photographs), or local defects with pixel masks:
            "scratch", "blot", "cut_paste", or "defects", the three in turn.
        train_patches: for textures: normal patches to train on.
        test_patches: for textures: normal patches to test on, and as many anomalous ones.
        grey: for folder: read the images in grey.
        aligned: whether one position means the same thing in every image; None is the data set's own answer (yes,
            except for textures).
        resident_megabytes: image sets up to this size live on the device, larger ones are read while training.
        workers: processes that read images of larger sets; 0 reads them in the main process.
    """

    dataset: str = "digits"
    root: str = "data"
    normal: str = "0"
    image_size: int | None = None
    outlier_ratio: float = 0.0
    test_fraction: float = 0.3
    seed: int = 0
    anomalies: str = "photographs"
    train_patches: int = 400
    test_patches: int = 150
    grey: bool = False
    aligned: bool | None = None
    resident_megabytes: int = 2048
    workers: int = 2


def check_image_size(config: DataConfig) -> None:
    """Raise `ArgumentError` for a side that no image has."""
    if config.image_size is not None:
        require_count(config.image_size, "image_size", 1)
