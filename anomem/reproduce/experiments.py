"""The experiments: their settings, the paper's figures, and what the paper's trend says, as one table.

Paper: Jezequel, Vu, Beaudet, Histace, arXiv 2211.09041, appendix sections B to D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anomem.models.config import DEFAULT_SCALES, Backbone
from anomem.reproduce import measures
from anomem.reproduce.cell import Setting
from anomem.reproduce.protocol import CLASSES, FOLDERS, RATIOS
from anomem.reproduce.trends import Values, best_margin, near_prototypes, no_difference, ordered
from anomem.train import TrainConfig

VARIANCE_WEIGHTS = (0.1, 0.05, 0.025, 0.01)
TABLE6 = (91.90, 91.91, 91.87, 91.86)
"""The paper's AUROC in percent at these weights."""
ABLATION_RATIO = 0.1
"""Labelled anomalies of the ablation's rows with labels."""


@dataclass(frozen=True)
class Experiment:
    """One table of the paper, or one question."""

    title: str
    settings: Mapping[str, Setting]
    scores: tuple[str, ...]
    """Columns of the table; the first is the experiment's own."""
    trend: Callable[[Values], list[str]]
    """Sentences about what the paper finds and what these cells show."""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Data set -> setting -> the paper's AUROC in percent."""
    extra: tuple[tuple[str, str], ...] = ()
    """Further columns: (entry, measure) of the metrics."""
    data: tuple[str, ...] = tuple(CLASSES)
    """Data sets it runs on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Where the command names none."""


def unchanged(config: TrainConfig) -> TrainConfig:
    """The data set's configuration."""
    return config


def changed(**sections: Mapping[str, Any]) -> Callable[[TrainConfig], TrainConfig]:
    """A change of settings.

    Args:
        sections: section of the configuration -> its settings to replace: `changed(loss={"variance_weight": 0.0})`.
    """

    def change(config: TrainConfig) -> TrainConfig:
        parts = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
        return replace(config, **parts)

    return change


def with_backbone(name: Backbone) -> Callable[[TrainConfig], TrainConfig]:
    """The configuration with another encoder and its own scales."""
    return changed(model={"backbone": name, "scales": ()})


def last_scale(config: TrainConfig) -> TrainConfig:
    """The coarsest scale alone."""
    scales = config.model.scales or DEFAULT_SCALES[config.model.backbone]
    return replace(config, model=replace(config.model, scales=scales[-1:], prototypes=config.model.prototypes[-1:]))


def exposed(ratio: float) -> Callable[[TrainConfig], TrainConfig]:
    """Labelled anomalies as a ratio of the normals."""
    return changed(data={"outlier_ratio": ratio})


def frozen_size(config: TrainConfig) -> TrainConfig:
    """Images of the side that the frozen encoder takes."""
    return replace(config, data=replace(config.data, image_size=128))


def weight_trend(values: Values) -> list[str]:
    """Table 6: no sensitivity to lambda_V; and the paper's default against the untrained control."""
    names = [f"lambda_V = {weight:g}" for weight in VARIANCE_WEIGHTS]
    trained = ordered(("lambda_V = 0.05", "untrained"), "linear")
    return no_difference(names, "linear", "lambda_V")(values) + trained(values)


ABLATION = {
    "default": Setting(unchanged, measures.trained, "the preset"),
    "positive: other view": Setting(
        changed(loss={"positive": "view"}),
        measures.refilled,
        "contrast of two views, no memory in training; memories filled with features afterwards. Its column "
        "detector/features has no memory at all",
    ),
    "memory refilled": Setting(
        unchanged, measures.refilled, "the preset, its memories filled with features afterwards"
    ),
    "last scale alone": Setting(last_scale, measures.trained),
    "no variance term": Setting(changed(loss={"variance_weight": 0.0}), measures.trained),
    "labels in both stages": Setting(
        exposed(ABLATION_RATIO), measures.trained, "10% labelled anomalies, half of each batch of stage 2"
    ),
    "labels in stage 2": Setting(exposed(ABLATION_RATIO), measures.labels_late, "stage 1 on the normals alone"),
    **{
        f"M = {count}": Setting(changed(model={"prototypes": (count,)}), measures.trained, about)
        for count, about in ((1, "control"), (16, ""), (64, ""), (256, ""))
    },
    "unit vectors, beta 1/sqrt(d)": Setting(changed(model={"normalize": "l2"}), measures.trained),
    "unit vectors, beta 10": Setting(changed(model={"normalize": "l2", "beta": 10.0}), measures.trained),
    "no normalisation": Setting(changed(model={"normalize": "none"}), measures.trained),
    "untrained": Setting(
        unchanged,
        measures.untrained,
        "control: no gradient step, batch norm calibrated, memories filled with features",
        trains=False,
    ),
}

EXPERIMENTS: dict[str, Experiment] = {
    "table6": Experiment(
        "Table 6: the weight lambda_V of the variance term, linear evaluation",
        {
            **{
                f"lambda_V = {weight:g}": Setting(changed(loss={"variance_weight": weight}), measures.linear)
                for weight in VARIANCE_WEIGHTS
            },
            "untrained": Setting(unchanged, measures.linear_untrained, "control: no gradient step", trains=False),
        },
        ("linear",),
        weight_trend,
        {
            "cifar10": dict(
                zip((f"lambda_V = {w:g}" for w in VARIANCE_WEIGHTS), (91.90, 91.91, 91.87, 91.86), strict=True)
            )
        },
    ),
    "table7": Experiment(
        "Table 7: linear against exponential lambda_s, one-class",
        {
            "linear": Setting(changed(model={"scale_weights": "linear"}), measures.trained, "lambda_s = s/S"),
            "exponential": Setting(changed(model={"scale_weights": "exp"}), measures.trained, "lambda_s = 2^(s−S)"),
            "untrained": Setting(
                unchanged, measures.untrained, "control: no gradient step, exponential lambda_s", trains=False
            ),
        },
        ("plain", "detector"),
        ordered(("exponential", "linear"), "plain", others=("untrained",)),
        {"cifar10": {"linear": 91.2, "exponential": 91.5}, "cifar100": {"linear": 85.6, "exponential": 86.1}},
    ),
    "backbones": Experiment(
        "Backbones, one-class",
        {
            "EfficientNet-B0": Setting(with_backbone("efficientnet_b0"), measures.backbone),
            "ResNet-50": Setting(with_backbone("resnet50"), measures.backbone),
            "ResNet-18": Setting(with_backbone("resnet18"), measures.backbone),
        },
        ("plain", "detector", "detector/features"),
        ordered(("EfficientNet-B0", "ResNet-50", "ResNet-18"), "plain"),
        extra=(("cost", "parameters"), ("cost", "seconds"), ("cost", "cpu_seconds")),
    ),
    "figure5": Experiment(
        "Figure 5: prototypes of the last scale among test samples",
        {
            "trained": Setting(unchanged, measures.figure5, "the preset"),
            "untrained": Setting(unchanged, measures.figure5_untrained, "control: no gradient step", trains=False),
        },
        ("plain", "detector"),
        near_prototypes,
        extra=(("overlap", "normals"), ("overlap", "anomalies"), ("overlap", "chance")),
        seeds=(0,),
    ),
    "ablation": Experiment(
        "Ablation: every part taken away",
        ABLATION,
        ("plain", "detector", "detector/features", "stage2"),
        ordered(("default", "untrained"), "plain", others=tuple(ABLATION)),
    ),
    "margin": Experiment(
        "Margin of stage 2: fixed and adaptive, balanced batches",
        {f"{ratio:.0%} labelled": Setting(exposed(ratio), measures.margins) for ratio in RATIOS},
        (*(f"M = {m:g}" for m in measures.MARGINS), "adaptive", "plain", "detector"),
        best_margin(tuple(f"M = {m:g}" for m in measures.MARGINS)),
    ),
    "protocol": Experiment(
        "One-vs-all: one-class (UNS) and outlier exposure (IMS)",
        {
            "one-class": Setting(unchanged, measures.trained, "UNS: normals alone"),
            **{
                f"{ratio:.0%} labelled": Setting(
                    exposed(ratio), measures.trained, f"IMS: {ratio:.0%} labelled anomalies"
                )
                for ratio in RATIOS
            },
            "untrained": Setting(unchanged, measures.untrained, "control: no gradient step", trains=False),
        },
        ("plain", "detector", "stage2"),
        ordered(("10% labelled", "one-class"), "plain", others=("untrained",)),
        {"cifar10": {"one-class": 91.5}, "cifar100": {"one-class": 86.1}},
    ),
    "mvtec": Experiment(
        "Classes of a folder: MVTec-AD, MVTec LOCO or VisA",
        {
            "fit": Setting(
                frozen_size, measures.fitted_localised, "frozen encoder, filled memories, 128 pixels", trains=False
            ),
            "train": Setting(unchanged, measures.localised, "the small encoder trained on the class, 64 pixels"),
        },
        ("lead",),
        lambda values: [],
        extra=(("lead", "pixel_auroc"), ("lead", "aupro"), ("lead", "aupimo")),
        data=(FOLDERS,),
        seeds=(0,),
    ),
}
"""Name of the subcommand -> experiment."""
