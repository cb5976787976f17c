"""A model's shapes and parameter counts as a table of text."""

from __future__ import annotations

from torch import nn

from anomem.models.model import AnoMem


def parameter_count(module: nn.Module) -> int:
    """Number of trained values of a module."""
    return sum(p.numel() for p in module.parameters())


def describe(model: AnoMem) -> str:
    """Stages, scales and memories with shapes and parameter counts, one line each.

    Args:
        model: what to describe.
    """
    encoder = model.encoder
    lines = [f"{'encoder':<12} {parameter_count(encoder):>12,} parameters"]
    lines += [f"  {name:<10} {parameter_count(stage):>12,}" for name, stage in encoder.parts.items()]
    scales = zip(encoder.names, encoder.channels, encoder.sizes, model.hopfield, model.scale_weights, strict=True)
    for name, channels, (height, width), memory, weight in scales:
        prototypes, features = memory.prototypes.shape
        lines.append(
            f"scale {name:<10} map [B, {channels}, {height}, {width}], memory [{prototypes}, {features}] "
            f"{parameter_count(memory):>9,} parameters, lambda {weight:g}"
        )
    projections = parameter_count(model.projections)
    if projections:
        lines.append(f"{'projections':<12} {projections:>12,} parameters")
    lines.append(f"{'total':<12} {parameter_count(model):>12,} parameters")
    return "\n".join(lines)
