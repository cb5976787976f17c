"""Stage 2: heads on the deviation maps of the frozen model, by the margin loss."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.data import Images
from anomem.models import AnoMem, DeviationHead
from anomem.train.batches import training_batches
from anomem.train.config import Stage2Config, TrainConfig
from anomem.train.monitor import Monitor
from anomem.train.optimizer import apply_gradients, build_optimizer, check_optimizer, learning_rate
from anomem.train.rundir import RunDirectory
from anomem.train.stage import StageState, autocast
from anomem.train.views import Views
from anomem.validation import require, require_count


def check_stage2(config: Stage2Config) -> None:
    """Raise `ArgumentError` for settings stage 2 cannot use."""
    check_optimizer(config.optimizer, "stage2.optimizer")
    require(config.margin > 1, "stage2.margin", "a number > 1", config.margin)
    require_count(config.hidden, "stage2.hidden", 1)
    require_count(config.embedding, "stage2.embedding", 1)


def margin_objective(head: DeviationHead, deviations: list[Tensor], normal: Tensor, margin: float) -> Tensor:
    """Σ_s lambda_s · margin loss of |g(s)|: 0-dim.

    Args:
        head: gives g(s) and lambda_s.
        deviations: S tensors [B, P_s, d_s].
        normal: [B] bool.
        margin: M > 1.
    """
    losses = [F.margin_loss(length, normal, margin) for length in head.lengths(deviations)]
    return torch.stack([w * loss for w, loss in zip(head.scale_weights, losses, strict=True)]).sum()


def train_stage2(
    model: AnoMem,
    head: DeviationHead,
    images: Images,
    is_normal: Tensor | None,
    config: TrainConfig,
    run: RunDirectory | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Train heads in place, from their checkpoint if the run has one; encoder and memories are frozen.

    Args:
        model: trained by stage 1, on the device of the images.
        head: fresh, on the same device.
        images: N ≥ 2 training images.
        is_normal: [N] bool on the same device; None when all are normal (then outliers must be synthesised).
        config: margin, optimisation, augmentation and execution.
        run: where logs and checkpoints go; None keeps neither.
        quiet: show nothing.

    Raises:
        ArgumentError: a setting no run can use, or no anomaly to learn from.
        UserError: a damaged checkpoint, or a loss that is not finite.
    """
    settings, device = config.stage2.optimizer, model.mean.device
    check_stage2(config.stage2)
    anomalies = is_normal is not None or config.synthetic_outliers > 0
    require(anomalies, "data.outlier_ratio", "labelled or synthetic anomalies for stage 2", "normal images only")
    generator = torch.Generator(device).manual_seed(config.run.seed + 1)
    views_of = Views(config, is_normal, generator)
    optimizer = build_optimizer(settings, head.parameters())
    state = StageState("stage2", {"head": head}, optimizer, generator, run)
    start = state.restore()
    model.eval()
    head.train()
    with Monitor(run, "stage2", start, settings.steps, config.run, quiet=quiet) as monitor:
        for step, batch, index in training_batches(images, settings.batch_size, config.run.seed, start, settings.steps):
            views, normal = views_of(batch, index, 1)  # [B, C, H, W], [B]
            assert normal is not None
            with autocast(config.run, device):
                with torch.no_grad():
                    deviations = model.deviations(model(views))  # S × [B, P, d]
                if step == 0:
                    head.fit_rms([[d[normal] for d in deviations]])
                loss = margin_objective(head, deviations, normal, config.stage2.margin)
            loss.backward()
            apply_gradients(optimizer, settings, step)
            if monitor.due(step, len(batch)):
                monitor.log(step, learning_rate(settings, step), {"loss": loss})
            if state.due(step + 1, settings.steps, config.run.checkpoint_every):
                monitor.flush()
                state.save(step + 1)
    head.eval()
