"""HopfieldMemory and NTXentLoss in a SimCLR loop of your own: python examples/simclr.py"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from anomem import nn as ann


def augmented(images: Tensor) -> Tensor:
    """Shifts of up to a pixel and noise; put your own augmentations here."""
    padded = F.pad(images, (1, 1, 1, 1))
    x, y = torch.randint(0, 3, (2,)).tolist()
    return padded[:, :, y : y + 8, x : x + 8] + 0.1 * torch.randn_like(images)


def main(steps: int = 150) -> float:
    """Train on one digit; returns the AUROC of the distance to the memory for all others."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)
    normal = images[labels == 3]
    train, held = normal[:120], normal[120:]

    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 64), nn.BatchNorm1d(64),
    )  # fmt: skip
    memory = ann.HopfieldMemory(features=64, prototypes=16, beta=0.5)
    criterion = ann.NTXentLoss(temperature=0.2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *memory.parameters()], lr=1e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        z0, z1 = (encoder(augmented(batch)) for _ in range(2))
        # Plain SimCLR on two views, and one view against what the memory makes of the other (AnoMem, Eq. 2).
        loss = criterion(z0, z1) + criterion(z0, memory(z1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # For scoring: a memory of the training images themselves, sharp enough to answer with the nearest of them.
    memory = ann.HopfieldMemory(features=64, prototypes=len(train), beta=0.5)
    encoder.eval()
    with torch.no_grad():
        memory.fill(encoder(train))
        distance = [memory.deviation(encoder(x)).norm(dim=1) for x in (held, images[labels != 3])]
    area = (distance[1][None] > distance[0][:, None]).float().mean().item()
    print(f"loss {loss.item():.3f}, AUROC {area:.3f}")
    return area


if __name__ == "__main__":
    main()
