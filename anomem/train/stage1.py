"""Stage 1 (Algorithm 1): encoder and memories by the contrast of memory-augmented views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from anomem.data import Images
from anomem.models import AnoMem
from anomem.train.batches import training_batches
from anomem.train.config import TrainConfig
from anomem.train.monitor import Monitor
from anomem.train.objective import draw_positions, fill_memories, memory_figures, multi_scale_loss, scale_criterion
from anomem.train.optimizer import apply_gradients, build_optimizer, check_optimizer, learning_rate
from anomem.train.rundir import RunDirectory
from anomem.train.stage import StageState, autocast
from anomem.train.views import Views


def train_stage1(
    model: AnoMem,
    images: Images,
    is_normal: Tensor | None,
    config: TrainConfig,
    run: RunDirectory | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Train a model in place, from its checkpoint if the run has one.

    Args:
        model: on the device of the images.
        images: N ≥ 2 training images.
        is_normal: [N] bool on the same device; None when all are normal.
        config: loss, optimisation, augmentation and execution.
        run: where logs and checkpoints go; None keeps neither.
        quiet: show nothing.

    Raises:
        ArgumentError: a setting no run can use.
        UserError: a damaged checkpoint, or a loss that is not finite.
    """
    settings, device = config.optimizer, model.mean.device
    check_optimizer(settings)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    views_of = Views(config, is_normal, generator)
    criterion = scale_criterion(config.loss, config.model.impl)
    weights = [*model.encoder.parameters(), *model.projections.parameters()]
    optimizer = build_optimizer(settings, weights, model.memories.parameters())
    state = StageState("stage1", {"model": model}, optimizer, generator, run)
    start = state.restore()
    model.train()
    with Monitor(run, "stage1", start, settings.steps, config.run, quiet=quiet) as monitor:
        for step, batch, index in training_batches(images, settings.batch_size, config.run.seed, start, settings.steps):
            with record_function("anomem.augment"):
                views, normal = views_of(batch, index, 2)  # [2B, C, H, W], [B]
            with autocast(config.run, device):
                if step == 0 and config.prototypes_from == "features":
                    fill_memories(model, views, normal, generator)
                with record_function("anomem.encode"):
                    maps = model(views)
                with record_function("anomem.contrast"):
                    positions = draw_positions(model.encoder.sizes, config.loss, len(views) // 2, generator)
                    sampled = model.sample(maps, positions)  # S × [n, 2B, d]
                    loss, terms = multi_scale_loss(model, criterion, sampled, normal)
            with record_function("anomem.backward"):
                loss.backward()
            with record_function("anomem.optimizer"):
                apply_gradients(optimizer, settings, step)
            if monitor.due(step, len(batch)):
                rate = learning_rate(settings, step)
                monitor.log(step, rate, {"loss": loss, **terms, **memory_figures(model, sampled)})
            if state.due(step + 1, settings.steps, config.run.checkpoint_every):
                monitor.flush()
                state.save(step + 1)
    model.eval()
