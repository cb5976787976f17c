"""Fair controls: what the figures of a run are held against."""

from __future__ import annotations

from dataclasses import replace

from anomem.data import Task
from anomem.evaluate.controls import calibrate_untrained
from anomem.evaluate.scoring import Scorer, fit_scorer
from anomem.train.config import TrainConfig
from anomem.train.run import model_for, train_task
from anomem.validation import require_choice

CONTROLS = ("untrained", "one_prototype")


def control(name: str, config: TrainConfig, task: Task, *, quiet: bool = True) -> Scorer:
    """A control, fitted to the same training normals with the same seed.

    "untrained": the same encoder without a gradient step, batch-norm statistics calibrated, memories filled with its
    own eval-mode features. "one_prototype": the whole training with M = 1 at every scale.

    Args:
        name: one of `CONTROLS`.
        config: of the run.
        task: on the device of the run.
        quiet: show no training.
    """
    require_choice(name, "controls", CONTROLS)
    if name == "one_prototype":
        single = replace(config, model=replace(config.model, prototypes=(1,)))
        return train_task(single, task, model_for(single, task), quiet=quiet)
    model = model_for(config, task)
    calibrate_untrained(model, task.train, task.train_is_normal, config.score.batch_size, config.run.seed)
    return fit_scorer(
        model, task.train, task.train_is_normal, aligned=task.aligned, augment=config.augment, config=config.score
    )
