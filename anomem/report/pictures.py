"""Images of the page: thumbnails, heat maps and outlines of masks as data URIs, and the images of prototypes."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.data import Images
from anomem.models import AnoMem
from anomem.reference.retrieve import hopfield_retrieve

SIDE = 128
"""Of a thumbnail in pixels; smaller images are kept as they are."""
HEAT_SIDE = 48
HEAT = ((0.0, (0, 0, 0, 0)), (0.35, (90, 20, 140, 90)), (0.65, (240, 90, 30, 170)), (1.0, (255, 235, 90, 215)))
"""Position on the scale -> red, green, blue, opacity."""
OUTLINE = (64, 224, 255, 255)


def photo(image: Tensor) -> str:
    """An image [C, H, W] uint8 as JPEG, or as PNG where it is small."""
    from PIL import Image

    if max(image.shape[1:]) > SIDE:
        scale = SIDE / max(image.shape[1:])
        size = [max(1, round(n * scale)) for n in image.shape[1:]]
        image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    array = image[0].numpy() if image.shape[0] == 1 else image[:3].movedim(0, -1).contiguous().numpy()
    small = max(image.shape[1:]) <= 32
    return _uri(Image.fromarray(array), "PNG" if small else "JPEG")


def heat(values: Tensor, low: float, high: float) -> str:
    """A map [H, W] as a transparent PNG on a scale that all images share."""
    from PIL import Image

    size = min(values.shape[0], HEAT_SIDE), min(values.shape[1], HEAT_SIDE)
    small = F.adaptive_avg_pool2d(values[None].float(), size)[0]
    level = ((small - low) / max(high - low, 1e-30)).clamp(0, 1)
    # 64 levels in a palette make a file a third as large.
    index = (level * 63).round().to(torch.uint8).numpy()
    picture = Image.fromarray(index, "P")
    colours = [_colour(i / 63) for i in range(64)]
    picture.putpalette([c for colour in colours for c in colour[:3]])
    return _uri(picture, "PNG", transparency=bytes(colour[3] for colour in colours))


def _colour(level: float) -> tuple[int, int, int, int]:
    for (low, start), (high, end) in itertools.pairwise(HEAT):
        if level <= high:
            part = (level - low) / (high - low)
            mixed = [round(a + part * (b - a)) for a, b in zip(start, end, strict=True)]
            return mixed[0], mixed[1], mixed[2], mixed[3]
    return HEAT[-1][1]


def outline(mask: Tensor) -> str | None:
    """The edge of a mask [H, W] bool as a transparent PNG; None where it is empty."""
    from PIL import Image

    if not bool(mask.any()):
        return None
    full = F.interpolate(mask[None, None].float(), (SIDE, SIDE), mode="nearest-exact")[0, 0] > 0
    inner = -F.max_pool2d(-full[None].float(), 3, 1, 1)[0] > 0
    edge = (full & ~inner).to(torch.uint8).numpy()
    picture = Image.fromarray(edge, "P")
    picture.putpalette([0, 0, 0, *OUTLINE[:3]])
    return _uri(picture, "PNG", transparency=bytes((0, OUTLINE[3])))


def _uri(picture: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 78} if kind == "JPEG" else {"optimize": True}), **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@torch.no_grad()
def prototypes(
    model: AnoMem, images: Images, rows: Tensor, batch_size: int, count: int = 12, each: int = 4
) -> list[dict[str, Any]]:
    """The most used prototypes of the coarsest memory, with the normal images that retrieve each of them most.

    Args:
        model: its last memory is read.
        images: training images, on the model's device.
        rows: [n] int64, the normals.
        batch_size: images per forward pass.
        count: prototypes, at most.
        each: images of each.

    Returns:
        "number", "share" of the retrieval and "images" of each, most used first.
    """
    memory, parts = model.memories[-1], []
    for batch, _ in images.batches(rows, batch_size):
        query = model.queries(model(batch))[-1]  # [b, P, d]
        retrieved = hopfield_retrieve(
            query, memory.prototypes, beta=memory.beta, steps=memory.steps, normalize=memory.normalize
        )
        parts.append(retrieved.weights.mean(dim=1).cpu())
    weights = torch.cat(parts)  # [n, M]
    usage = weights.mean(dim=0)
    order = usage.argsort(descending=True, stable=True)[:count].tolist()
    best = weights[:, order].topk(min(each, len(weights)), dim=0).indices  # [each, count]
    wanted = rows.cpu()[best.flatten()]
    pictures = [p for batch, _ in images.batches(wanted, batch_size) for p in batch.cpu()]
    found = [photo(p) for p in pictures]
    columns = len(order)
    return [
        {"number": number, "share": f"{100 * float(usage[number]):.2g}%", "images": found[i::columns]}
        for i, number in enumerate(order)
    ]


def chosen(scores: Tensor, is_anomaly: Tensor, threshold: float, at_most: int) -> list[int]:
    """Which images to show where there are too many: half of them the worst mistakes, the rest evenly by score."""
    if len(scores) <= at_most:
        return list(range(len(scores)))
    signed = torch.where(is_anomaly, threshold - scores.double(), scores.double() - threshold)  # > 0: a mistake
    worst = signed.argsort(descending=True, stable=True)[: at_most // 2].tolist()
    taken = set(worst)
    others = [i for i in scores.argsort(stable=True).tolist() if i not in taken]
    places = torch.linspace(0, len(others) - 1, at_most - len(worst)).round().long().tolist()
    return [*worst, *(others[i] for i in places)]


def shortened(names: Sequence[str]) -> list[str]:
    """The last part of each path."""
    return [name.rsplit("/", 1)[-1] for name in names]
