"""Stage 1 (Algorithm 1): trains encoder and memories by the contrast of memory-augmented views.

Digits, one-class, 150 steps: 6.7 s with fitting and scoring (median of 20 runs; one thread of an x86-64 CPU with
AVX-512, torch 2.14.1). AUROC of the detector 0.995 ± 0.002, of the plain deviation 0.946 ± 0.017: mean over ten normal
classes, two seeds. Rows "digits", "one-class" of benchmarks/results/accuracy.jsonl; not measured on a GPU yet.

The ranges "anomem.batch", "anomem.augment", "anomem.encode", "anomem.contrast", "anomem.backward" and
"anomem.optimizer" show where a step spends its time under `torch.profiler`.
"""

from __future__ import annotations

from torch import Tensor
from torch.profiler import record_function

from anomem.data import Images
from anomem.errors import enough_memory
from anomem.models import AnoMem
from anomem.train.batches import (
    Average,
    Batch,
    apply_gradients,
    build_optimizer,
    learning_rate,
    set_rates,
    training_batches,
)
from anomem.train.captured import Captured, obstacle
from anomem.train.checkpoint import StageState
from anomem.train.config import TrainConfig
from anomem.train.execution import arrange, settled
from anomem.train.monitor import Monitor
from anomem.train.network import Network
from anomem.train.objective import Views, memory_figures
from anomem.train.ranks import Ranks
from anomem.train.rundir import RunDirectory
from anomem.train.steps import Loss, Stage1Step
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
    ranks = Ranks.current()
    config = settled(config, model.device)
    settings, seed = config.optimizer, config.run.seed
    arrange(model, config.run)
    execution = config.run
    network = Network(
        model, ranks, execution.parallel == "fsdp", execution.compile is True, batch_norm=execution.batch_norm
    )
    step_of = Stage1Step(model, network, images, is_normal, config, ranks, Views)
    named = network.parameters()
    memories = [p for name, p in named if name.startswith("memories.")]
    optimizer = build_optimizer(settings, [p for name, p in named if not name.startswith("memories.")], memories)
    average = Average(named, settings.ema)
    state = StageState("stage1", {"model": model}, optimizer, images, config, run, average, ranks, network)
    start = state.restore()
    model.train()
    network.encoder.train()
    shares = step_of.shares

    def step(batch: Batch) -> Loss:
        loss = step_of(batch)
        with record_function("anomem.optimizer"):
            apply_gradients(optimizer, settings)
            average.update()
        return loss

    captured = Captured(step, step_of.draws, obstacle(config.run, model.device, ranks, shares), quiet=quiet)
    with (
        enough_memory(MEMORY),
        Monitor(run, "stage1", start, settings.steps, config.run, quiet=quiet, ranks=ranks) as monitor,
        stopping_after_the_step() as request,
    ):
        # A batch is uint8 and on the device already: resident sets are indexed there, streamed ones copy from pinned
        # memory while the device still works on the step before.
        batches = training_batches(
            images, shares.batch, seed, start, settings.steps, shares.places, at_once=shares.at_once
        )
        for batch in batches:
            set_rates(optimizer, average, settings, batch.step)
            loss = captured(batch)
            if monitor.due(batch.step, shares.batch):
                # No `loss.item()`: it would wait for the device. The host reads these values once they have arrived.
                figures = memory_figures(model, loss.sampled)
                rate = learning_rate(settings, batch.step)
                monitor.log(batch.step, rate, {"loss": loss.total, **loss.terms, **figures})
            state.step_done(batch.step + 1, settings.steps, monitor, request)
    average.finish()
    network.gather()
    model.eval()
