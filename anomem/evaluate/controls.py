"""The fair control: the same encoder, untrained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anomem.data import Images
from anomem.models import AnoMem


@torch.no_grad()
def calibrate_untrained(model: AnoMem, images: Images, is_normal: Tensor, batch_size: int = 256, seed: int = 0) -> None:
    """Give a fresh model all that training images can give it without a gradient.

    Batch-norm statistics are averaged over the training normals, then each memory is filled with the encoder's own
    eval-mode features of them.

    Args:
        model: fresh, on the device of the images; left in eval mode.
        images: training images.
        is_normal: [N] bool.
        batch_size: images per forward pass.
        seed: of the choice of features.
    """
    normals = is_normal.nonzero().flatten()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for batch, _ in images.batches(normals, batch_size):
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    fill_from_features(model, images, is_normal, batch_size, seed)


@torch.no_grad()
def fill_from_features(model: AnoMem, images: Images, is_normal: Tensor, batch_size: int = 256, seed: int = 0) -> None:
    """Fill every memory with eval-mode features of training normals, drawn at random over images and positions.

    Args:
        model: on the device of the images; left in eval mode.
        images: training images.
        is_normal: [N] bool.
        batch_size: images per forward pass.
        seed: of the choice.
    """
    model.eval()
    normals = is_normal.nonzero().flatten()
    shuffled = normals[torch.randperm(len(normals), generator=torch.Generator().manual_seed(seed)).to(normals.device)]
    # A few hundred images hold far more positions than a memory has prototypes.
    batch, _ = next(iter(images.batches(shuffled[:batch_size], batch_size)))
    generator = torch.Generator(batch.device).manual_seed(seed)
    for query, memory in zip(model.queries(model(batch)), model.hopfield, strict=True):
        memory.fill(query.flatten(0, 1), generator)
