"""One gradient step of stage 1, written out so that its parts can be timed; it gives the loss of `anomem.train`."""

from __future__ import annotations

import torch
from anomem.models import AnoMem
from anomem.train.config import LossConfig, OptimizerConfig
from anomem.train.objective import draw_positions
from anomem.train.optimizer import apply_gradients, build_optimizer
from torch import Tensor

from anomem import functional as F
from anomem.backends import for_part
from benchmarks.training.phases import Phases


class Step:
    """Forward, backward and update of a model.

    Args:
        model: in training mode; its memories name the implementation.
        device: "cpu" or "cuda".
        bf16: run the encoder under bfloat16 autocast.
        loss_in_float32: take the sampled vectors to float32 first, as a loss written in plain PyTorch has it.
    """

    def __init__(self, model: AnoMem, device: str, *, bf16: bool, loss_in_float32: bool) -> None:
        self.model = model
        self.device = device
        self.bf16 = bf16
        self.loss_in_float32 = loss_in_float32
        self.loss_config = LossConfig()
        self.settings = OptimizerConfig(steps=1000, warmup=0)
        weights = [*model.encoder.parameters(), *model.projections.parameters()]
        self.optimizer = build_optimizer(self.settings, weights, model.memories.parameters())
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, views: Tensor, phases: Phases) -> Tensor:
        """One step.

        Args:
            views: [2B, C, H, W] in [0, 1]: first views, then second.
            phases: told where the time goes.

        Returns:
            The loss, 0-dim.
        """
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(views, phases)
        with phases("backward"):
            loss.backward()
        with phases("optimizer"):
            apply_gradients(self.optimizer, self.settings, 0)
        return loss.detach()

    def loss(self, views: Tensor, phases: Phases) -> Tensor:
        """L_COM-MS, Eq. (4)."""
        with phases("encoder forward"):
            maps = self.model(views)
        with phases("gather"):
            positions = draw_positions(self.model.encoder.sizes, self.loss_config, len(views) // 2, self.generator)
            sampled = self.model.sample(maps, positions)  # S × [n, 2B, d]
        if not self.loss_in_float32:
            return self._contrasted(sampled, phases)
        with torch.autocast(self.device, enabled=False):
            return self._contrasted([vectors.float() for vectors in sampled], phases)

    def _contrasted(self, sampled: list[Tensor], phases: Phases) -> Tensor:
        total = sampled[0].new_zeros((), dtype=torch.float32)
        for vectors, memory, weight in zip(sampled, self.model.hopfield, self.model.scale_weights, strict=True):
            z, z_pair = vectors.chunk(2, dim=1)  # [n, B, d]
            views, asked = torch.cat([z, z_pair]), torch.cat([z_pair, z])  # [2n, B, d]
            with phases("retrieval"):
                read = memory(asked)
            with phases("contrastive"):
                temperature, impl = self.loss_config.temperature, memory.impl
                contrast = F.nt_xent(views.to(read.dtype), read, temperature=temperature, impl=impl)
                variance = F.variance_hinge(read, impl=for_part("variance", self.device, impl))
            total = total + weight * (contrast + self.loss_config.variance_weight * variance)
        return total
