"""Stage 1 (Algorithm 1): trains encoder and memories by the contrast of memory-augmented views.

Digits, one-class, 150 steps: 6.7 s with fitting and scoring (median of 20 runs; one thread of an x86-64 CPU with
AVX-512, torch 2.14.1). AUROC of the detector 0.995 ± 0.002, of the plain deviation 0.946 ± 0.017: mean over ten normal
classes, two seeds. Rows "digits", "one-class" of benchmarks/results/accuracy.jsonl; not measured on a GPU yet.

The ranges "anomem.batch", "anomem.augment", "anomem.encode", "anomem.contrast", "anomem.backward" and
"anomem.optimizer" show where a step spends its time under `torch.profiler`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from anomem.data import Images
from anomem.errors import enough_memory
from anomem.models import AnoMem
from anomem.train.batches import apply_gradients, autocast, build_optimizer, learning_rate, training_batches
from anomem.train.checkpoint import StageState
from anomem.train.config import TrainConfig
from anomem.train.monitor import Monitor
from anomem.train.objective import (
    Views,
    draw_positions,
    fill_memories,
    memory_figures,
    multi_scale_loss,
    scale_criterion,
)
from anomem.train.rundir import RunDirectory
from anomem.train.stopping import stopping_after_the_step

MEMORY = "--optimizer.batch-size, --data.image-size or --loss.max-positions"


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
        run: gets logs and checkpoints; None writes neither.
        quiet: show nothing.

    Raises:
        UserError: a damaged checkpoint, a loss or a weight that is not finite, or out of memory.
        Interrupted: a signal asked to stop; the state is saved if there is a run.
    """
    settings, seed = config.optimizer, config.run.seed
    generator = torch.Generator(model.device).manual_seed(seed)
    views_of = Views(config, is_normal, generator)
    criterion = scale_criterion(config.loss, config.model.impl)
    by_memory = config.loss.positive == "memory"
    weights = [*model.encoder.parameters(), *model.projections.parameters()]
    optimizer = build_optimizer(settings, weights, model.memories.parameters())
    state = StageState("stage1", {"model": model}, optimizer, generator, images, config, run)
    start = state.restore()
    model.train()
    with (
        enough_memory(MEMORY),
        Monitor(run, "stage1", start, settings.steps, config.run, quiet=quiet) as monitor,
        stopping_after_the_step() as request,
    ):
        # A batch is uint8 and on the device already: resident sets are indexed there, streamed ones copy from pinned
        # memory while the device still works on the step before.
        for step, batch, index in training_batches(images, settings.batch_size, seed, start, settings.steps):
            with record_function("anomem.augment"):
                views, normal = views_of(batch, index, 2)  # [2B, C, H, W], [B]
            with autocast(config.run, model.device):
                if step == 0 and config.prototypes_from == "features":
                    # Under autocast, so that the first prototypes have the precision of the first queries.
                    fill_memories(model, views, normal, generator)
                with record_function("anomem.encode"):
                    maps = model(views)
                with record_function("anomem.contrast"):
                    # Drawn here, not in the kernels: every implementation then contrasts the same pairs, and the
                    # checkpoint of this one generator is enough to resume with identical bits.
                    positions = draw_positions(model.encoder.sizes, config.loss, len(views) // 2, generator)
                    sampled = model.sample(maps, positions)  # S × [n, 2B, d]
                    # Those whose positive is what the memory returns: the normals, or none.
                    answered = normal if by_memory else views.new_zeros(len(views) // 2, dtype=torch.bool)
                    loss, terms = multi_scale_loss(model, criterion, sampled, answered)
            with record_function("anomem.backward"):
                loss.backward()
            with record_function("anomem.optimizer"):
                apply_gradients(optimizer, settings, step)
            if monitor.due(step, len(batch)):
                # No `loss.item()`: it would wait for the device. The host reads these values once they have arrived.
                rate = learning_rate(settings, step)
                monitor.log(step, rate, {"loss": loss, **terms, **memory_figures(model, sampled)})
            state.step_done(step + 1, settings.steps, monitor, request)
    model.eval()
