"""One gradient step of stage 1, written out so that its parts can be timed.

It is the step of `anomem.train` with that package's defaults, which a test compares; it does without the package itself
because that needs rich, which a bare GPU machine may not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.backends import for_part
from anomem.models import AnoMem
from benchmarks.suites import MOST_POSITIONS, RATIO
from benchmarks.training.phases import Phases

TEMPERATURE = 0.2
VARIANCE_WEIGHT = 0.05


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
        groups = [
            {"params": [*model.encoder.parameters(), *model.projections.parameters()], "weight_decay": 5e-4},
            {"params": [*model.memories.parameters()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
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
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, views: Tensor, phases: Phases) -> Tensor:
        """L_COM-MS, Eq. (4)."""
        with phases("encoder forward"):
            maps = self.model(views)
        with phases("gather"):
            sampled = self.model.sample(maps, self.positions())  # S × [n, 2B, d]
        if not self.loss_in_float32:
            return self._contrasted(sampled, phases)
        with torch.autocast(self.device, enabled=False):
            return self._contrasted([vectors.float() for vectors in sampled], phases)

    def positions(self) -> list[Tensor]:
        """Sampled positions [n] of every scale, the same for both views."""
        generator, device = self.generator, self.device
        drawn = [
            F.sample_positions(height, width, RATIO, generator=generator, device=device)
            for height, width in self.model.encoder.sizes
        ]
        return [one[:MOST_POSITIONS].contiguous() for one in drawn]

    def _contrasted(self, sampled: list[Tensor], phases: Phases) -> Tensor:
        total = sampled[0].new_zeros((), dtype=torch.float32)
        for vectors, memory, weight in zip(sampled, self.model.memories, self.model.scale_weights, strict=True):
            z, z_pair = vectors.chunk(2, dim=1)  # [n, B, d]
            views, asked = torch.cat([z, z_pair]), torch.cat([z_pair, z])  # [2n, B, d]
            with phases("retrieval"):
                read = memory(asked)
            with phases("contrastive"):
                contrast = F.nt_xent(views.to(read.dtype), read, temperature=TEMPERATURE, impl=memory.impl)
                variance = F.variance_hinge(read, impl=for_part("variance", self.device, memory.impl))
            total = total + weight * (contrast + VARIANCE_WEIGHT * variance)
        return total
