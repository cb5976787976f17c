"""Which images each setting is measured on, most wanted first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from anomem.train import TrainConfig
from anomem.train.config import preset
from benchmarks.accuracy.settings import SETTINGS

DIGITS = ("3", "8", "9")
OTHER_DIGITS = ("0", "1", "2", "4", "5", "6", "7")
TEXTURES = ("brick", "grass", "gravel")


@dataclass(frozen=True)
class Job:
    """One setting on one task."""

    dataset: str
    normal: str
    anomalies: str
    """"classes", or for textures as in `DataConfig.anomalies`."""
    seed: int
    """Of the split, the weights and everything drawn."""
    setting: str

    @property
    def config(self) -> TrainConfig:
        """The configuration, complete."""
        config = preset(self.dataset)
        data = replace(config.data, normal=self.normal, seed=self.seed)
        if self.anomalies != "classes":
            data = replace(data, anomalies=self.anomalies)
        change, _ = SETTINGS[self.setting]
        return change(replace(config, data=data, run=replace(config.run, seed=self.seed, device="cpu")))


def jobs() -> Iterator[Job]:
    """Everything the tables hold."""
    for seed in (0, 1):
        for setting in SETTINGS:
            for normal in DIGITS:
                yield Job("digits", normal, "classes", seed, setting)
        for setting in ("one-class", "untrained", "raw pixels"):
            for normal in OTHER_DIGITS:
                yield Job("digits", normal, "classes", seed, setting)
        for anomalies in ("photographs", "scratch"):
            for setting in ("one-class", "one-class, refilled", "untrained", "one prototype", "raw pixels"):
                for normal in TEXTURES:
                    yield Job("textures", normal, anomalies, seed, setting)
