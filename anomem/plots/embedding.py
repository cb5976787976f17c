"""t-SNE of prototypes with normal and anomalous samples (figure 5 of the paper)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from anomem.errors import optional
from anomem.plots.style import ANOMALOUS, INK, NORMAL, figure
from anomem.validation import require


def tsne(
    prototypes: Tensor,
    normal: Tensor,
    anomalous: Tensor,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    at_most: int = 800,
) -> None:
    """One map of prototypes and samples by the cosine distance of their vectors.

    Args:
        prototypes: [M, d], normalised as the memory normalises them.
        normal: [N, d] vectors of normal test samples, in the same space.
        anomalous: [A, d] vectors of anomalous ones.
        path: where to write.
        seed: of the t-SNE and of the choice where a set is larger than `at_most`.
        at_most: samples of either sort that are drawn.
    """
    with optional("t-SNE"):
        from sklearn.manifold import TSNE

    generator = torch.Generator().manual_seed(seed)
    groups = [_some(x, at_most, generator) for x in (prototypes, normal, anomalous)]
    same = len({x.shape[-1] for x in groups}) == 1 and all(x.dim() == 2 for x in groups)
    require(same, "prototypes", "[M, d] like [N, d] and [A, d] of the samples", lambda: [list(x.shape) for x in groups])
    rows = torch.cat(groups)
    require(len(rows) >= 4, "normal", "at least four vectors in all", len(rows))
    require(bool(rows.isfinite().all()), "normal", "finite vectors", "NaN or infinity")
    perplexity = min(30.0, (len(rows) - 1) / 3)
    # The first two principal components of the unit vectors, small as t-SNE wants its start; an exact decomposition,
    # since a randomised one would make the figure depend on what was drawn before.
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    axes_of_data = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    start = (axes_of_data.U[:, :2] * 1e-2).float()
    embedding = TSNE(metric="cosine", init=start.numpy(), perplexity=perplexity, random_state=seed).fit_transform(
        rows.numpy()
    )
    placed = torch.from_numpy(embedding).split([len(x) for x in groups])
    with figure(path, 6.4, 5.2) as drawn:
        axes = drawn.subplots()
        looks = (
            # name, places, fill, outline, marker, area in square points; prototypes are hollow, to hide nothing
            ("normal samples", placed[1], NORMAL, "white", "o", 18),
            ("anomalous samples", placed[2], ANOMALOUS, "white", "^", 18),
            ("prototypes", placed[0], "none", INK, "D", 34),
        )
        for name, points, fill, outline, marker, area in looks:
            axes.scatter(
                points[:, 0].numpy(), points[:, 1].numpy(), s=area, c=fill, edgecolors=outline, marker=marker,
                linewidths=1.1 if fill == "none" else 0.4, label=f"{name} ({len(points)})",
            )  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title("t-SNE by cosine distance (axes have no unit)")
        axes.set_aspect("equal", adjustable="datalim")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _some(vectors: Tensor, at_most: int, generator: torch.Generator) -> Tensor:
    vectors = vectors.detach().cpu().float()
    return vectors[torch.randperm(len(vectors), generator=generator)[:at_most]]
