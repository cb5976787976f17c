"""Settings to start from, one preset per data set."""

from __future__ import annotations

from dataclasses import replace

from anomem.augment import AugmentConfig
from anomem.data import DataConfig
from anomem.models import ModelConfig
from anomem.train.config import OptimizerConfig, RunConfig, Stage2Config, TrainConfig
from anomem.validation import require_choice

NAMES = ("digits", "textures", "cifar10", "cifar100", "folder")


def preset(name: str) -> TrainConfig:
    """The preset of a data set.

    digits and textures: the small encoder and a hundred-odd steps, seconds to minutes on a CPU. cifar10, cifar100:
    the paper's setting (ResNet-18 and batches of 1024; 200 epochs of a class). folder: ResNet-18 on 128 pixels.

    Args:
        name: as in `DataConfig.dataset`.

    Raises:
        ArgumentError: an unknown name.
    """
    require_choice(name, "preset", NAMES)
    augment = AugmentConfig.for_dataset(name)
    if name == "digits":
        return TrainConfig(data=DataConfig(dataset="digits", normal="3"), augment=augment, prototypes_from="normal")
    if name == "textures":
        return TrainConfig(
            data=DataConfig(dataset="textures", normal="brick"),
            augment=augment,
            optimizer=OptimizerConfig(steps=40, batch_size=64),
        )
    long = OptimizerConfig(steps=1000, batch_size=1024, learning_rate=0.1, warmup=50)
    stage2 = Stage2Config(optimizer=replace(Stage2Config().optimizer, steps=300))
    accelerated = RunConfig(channels_last=True, checkpoint_every=100)
    if name == "folder":
        return TrainConfig(
            data=DataConfig(dataset="folder", normal="0"),
            augment=augment,
            model=ModelConfig(backbone="resnet18", prototypes=(256,)),
            optimizer=replace(long, batch_size=128, learning_rate=0.05),
            stage2=stage2,
            run=accelerated,
        )
    return TrainConfig(
        data=DataConfig(dataset=name, normal="0"),
        augment=augment,
        model=ModelConfig(backbone="resnet18", prototypes=(256,)),
        optimizer=long,
        stage2=stage2,
        run=accelerated,
    )
