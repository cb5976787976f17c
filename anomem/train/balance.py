"""Training sets in which half of the images are labelled anomalies."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.data import Images
from anomem.data.chosen import ChosenImages

FEW = 0.1
"""Labelled anomalies per normal image below which a filled memory uses them better than stage 2."""


def balanced(images: Images, is_normal: Tensor | None) -> tuple[Images, Tensor | None]:
    """A set in which normals and labelled anomalies are equally many: the fewer ones are repeated in turn.

    The margin loss of a batch in which few images are anomalies is that of the normals.

    Args:
        images: N images.
        is_normal: [N] bool; None when all are normal.

    Returns:
        The set, and which of its images are normal. Unchanged where all images are normal or all anomalies.
    """
    if is_normal is None or bool(is_normal.all()) or not bool(is_normal.any()):
        return images, is_normal
    normals, anomalies = (flags.nonzero().flatten().cpu() for flags in (is_normal, ~is_normal))
    count = max(len(normals), len(anomalies))
    rows = torch.cat([of_kind[torch.arange(count) % len(of_kind)] for of_kind in (normals, anomalies)])
    return ChosenImages(images, rows), (torch.arange(2 * count) < count).to(is_normal.device)


def few_labels(is_normal: Tensor) -> str | None:
    """What to do instead of stage 2 where labelled anomalies are few; None where they are not.

    Args:
        is_normal: [N] bool.
    """
    normals, anomalies = int(is_normal.sum()), int((~is_normal).sum())
    if not 0 < anomalies < FEW * normals:
        return None
    return (
        f"stage 2 with {anomalies} labelled anomalies for {normals} normals is the weaker way: with fewer than "
        f"{FEW:.0%}, `anomem fit DIR --labels FOLDER` learns more from them"
    )
