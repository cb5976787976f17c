"""Stage 2: trains heads on the deviation maps of the frozen model by the margin loss.

Digits with one labelled anomaly per ten normals, 150 steps of each stage: 11.4 s with fitting and scoring (median of 6
runs; one thread of an x86-64 CPU with AVX-512, torch 2.14.1). AUROC of the heads 0.989 ± 0.005: mean over the normal
classes 3, 8 and 9, two seeds. Rows "digits", "outlier exposure" of benchmarks/results/accuracy.jsonl; not measured on a
GPU yet. Those rows drew batches in the set's own proportion. Half anomalies, as now, gave 0.984 and 0.983 beside 0.988
and 0.988 on classes 3 and 8 (seed 0); with three anomalies per hundred normals 0.970 and 0.891 beside 0.972 and 0.874.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from anomem import functional as AF
from anomem.data import Images
from anomem.errors import enough_memory
from anomem.models import AnoMem, DeviationHead
from anomem.train.balance import balanced
from anomem.train.batches import (
    Average,
    apply_gradients,
    build_optimizer,
    learning_rate,
    set_rates,
    training_batches,
)
from anomem.train.checkpoint import StageState
from anomem.train.config import TrainConfig
from anomem.train.execution import autocast, settled
from anomem.train.margin import AdaptiveMargin
from anomem.train.monitor import Monitor
from anomem.train.objective import Views
from anomem.train.ranks import Ranks
from anomem.train.rows import Draws
from anomem.train.rundir import RunDirectory
from anomem.train.steps import Shares
from anomem.train.stopping import stopping_after_the_step
from anomem.validation import require

MEMORY = "--stage2.optimizer.batch-size or --data.image-size"


def margin_objective(
    weights: Sequence[float], lengths: Sequence[Tensor], normal: Tensor, margin: float | Tensor
) -> Tensor:
    """Σ_s lambda_s · margin loss of |g(s)|: 0-dim.

    Args:
        weights: lambda_s.
        lengths: |g(s)| of each scale, S tensors [B].
        normal: [B] bool.
        margin: M ≥ 1.
    """
    losses = [AF.margin_loss(length, normal, margin) for length in lengths]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


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
        is_normal: [N] bool on the same device; None when all are normal (then outliers must be synthetic).
        config: margin, optimisation, augmentation and execution.
        run: gets logs and checkpoints; None writes neither.
        quiet: show nothing.

    Raises:
        ArgumentError: normal images only and no synthetic outliers.
        UserError: a damaged checkpoint, a loss or a weight that is not finite, or out of memory.
        Interrupted: a signal asked to stop; the state is saved if there is a run.
    """
    anomalies = is_normal is not None or config.synthetic_outliers > 0
    require(anomalies, "data.outlier_ratio", "labelled or synthetic anomalies for stage 2", "normal images only")
    images, is_normal = balanced(images, is_normal)  # half of a batch are labelled anomalies, where there are any
    ranks = Ranks.current()
    config = settled(config, model.device)
    settings, seed = config.stage2.optimizer, config.run.seed
    draws = Draws(model.device, seed + (1 << 40))  # other views than in stage 1
    views_of = Views(config, is_normal, draws)
    shares = Shares(len(images), settings, config.synthetic_outliers, ranks)
    parts = [rows for part in shares.parts for rows in part]  # the loss is a mean over images
    named = [(f"head.{name}", p) for name, p in head.named_parameters()]
    optimizer = build_optimizer(settings, head.parameters())
    average = Average(named, settings.ema)
    adaptive = AdaptiveMargin(config.stage2.margin).to(model.device) if config.stage2.adaptive else None
    modules = {"head": head} if adaptive is None else {"head": head, "margin": adaptive}
    state = StageState("stage2", modules, optimizer, images, config, run, average, ranks)
    start = state.restore()
    model.eval()
    head.train()
    everything = sum(sum(counts) for counts in shares.counts)
    with (
        enough_memory(MEMORY),
        Monitor(run, "stage2", start, settings.steps, config.run, quiet=quiet, ranks=ranks) as monitor,
        stopping_after_the_step() as request,
    ):
        # Uint8 and on the device already, as in stage 1.
        for batch in training_batches(images, shares.batch, seed, start, settings.steps, shares.places):
            draws.begin(batch.step)
            set_rates(optimizer, average, settings, batch.step)
            total, violations = torch.zeros((), device=model.device), []
            margin = config.stage2.margin if adaptive is None else adaptive.value.clone()
            for number, rows in enumerate(parts):
                with record_function("anomem.augment"):
                    views, normal = views_of(batch, rows, 1)  # [R, C, H, W], [R]
                    assert normal is not None
                with autocast(config.run, model.device):
                    with record_function("anomem.encode"), torch.no_grad():
                        deviations = model.deviations(model(views))  # S × [R, P, d], at all positions
                    if batch.step == 0 and number == 0:
                        # Under autocast, so that the unit of the deviations has the precision of training. The host
                        # waits for it, once.
                        fit_unit(head, deviations, normal, ranks)
                    with record_function("anomem.margin"):
                        weight = len(rows) * ranks.count / everything
                        lengths = head.lengths(deviations)
                        loss = margin_objective(head.scale_weights, lengths, normal, margin) * weight
                        if adaptive is not None:
                            violations.append(adaptive.violations(lengths, normal, head.scale_weights))
                with record_function("anomem.backward"):
                    loss.backward()
                total = total + loss.detach()
            with record_function("anomem.optimizer"):
                ranks.average([p.grad for p in head.parameters() if p.grad is not None])
                apply_gradients(optimizer, settings)
                average.update()
                if adaptive is not None:
                    adaptive.update(ranks.mean(torch.stack(violations).sum(dim=0)))
            if monitor.due(batch.step, shares.batch):
                # No `loss.item()`: it would wait for the device. The host reads the value once it has arrived.
                terms = {"loss": total} | ({"margin": margin} if isinstance(margin, Tensor) else {})
                monitor.log(batch.step, learning_rate(settings, batch.step), terms)
            state.step_done(batch.step + 1, settings.steps, monitor, request)
    average.finish()
    head.eval()


def fit_unit(head: DeviationHead, deviations: list[Tensor], normal: Tensor, ranks: Ranks) -> None:
    """Set the unit of the deviations from the first normal images, of all processes.

    Args:
        head: gets it.
        deviations: S tensors [R, P_s, d_s].
        normal: [R] bool; a small batch may be without a normal image, then all are taken.
        ranks: the processes.
    """
    normals = normal.cpu().nonzero().flatten()
    (most,) = ranks.largest(len(normals))
    chosen = (normals if most else torch.arange(len(normal))).to(normal.device)
    head.fit_rms([[d[chosen] for d in deviations]], None if ranks.count == 1 else ranks.mean)
