"""The options of every command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anomem.train.config import Preset, TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Preset | None = None
    """Settings to start from; that of --data.dataset when not given."""
    config: Path | None = None
    """Settings to start from: the config.json of a run. Options on the command line come on top."""
    resume: Path | None = None
    """Go on with the run in this directory; its own settings are used."""
    quiet: bool = False
    """Print only the run directory."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, next to baselines and controls; writes metrics.json and scores.csv."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    controls: tuple[Literal["untrained", "one_prototype"], ...] = ()
    """Fair controls to compute as well: the untrained encoder; the whole training with one prototype."""
    baselines: bool = True
    """Fit kNN, one-class SVM, LOF and isolation forest on raw pixels."""


@dataclass(frozen=True)
class Score:
    """Score image files with a trained run; higher is more anomalous."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    run: Path
    """Run directory."""
    by: str | None = None
    """Which score: plain, prior, energy, detector or stage2; stage2 where the run has one, else detector."""
    output: Path | None = None
    """Write a .csv or .json file with all scores instead of printing one."""
    maps: Path | None = None
    """Also write deviation maps into this folder, a .tiff of float32 for each image, at its size; those of "plain" with
    --by plain, else of "detector"."""


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
