"""How a run executes where its configuration says "auto": precision and memory format, by rule.

A stage-1 step on a Zen 4 processor (AVX512-BF16, one thread, CPU time), small encoder, 64 images of 64 pixels: eager
float32 689 ms, channels-last 453 ms, channels-last with bfloat16 273 ms. `python -m benchmarks.profile_training`
measures another machine. Not measured on a GPU yet.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from anomem.errors import UserError
from anomem.models import AnoMem
from anomem.train.config import RunConfig, TrainConfig


def settled(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The same configuration without "auto" in its execution; a run keeps this one, so that a resumption is the same.

    Args:
        config: of the run.
        device: of the model.

    Raises:
        UserError: bf16 is asked for on a device that has none.
    """
    run = config.run
    precision, layout = run.precision, run.memory_format
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device.type) else "float32"
    if layout == "auto":
        layout = "channels_last" if device.type in ("cpu", "cuda") else "contiguous"
    if precision == "bf16" and device.type not in ("cpu", "cuda"):
        raise UserError(f"`run.precision`: bf16 runs on cpu and cuda, received the device {device.type}; take float32")
    return replace(config, run=replace(run, precision=precision, memory_format=layout))


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 natively: AMX or AVX512-BF16; a GPU from Ampere on."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Newer than the oldest supported torch.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def layout_of(config: RunConfig) -> torch.memory_format:
    """The memory format of images, maps and convolution weights."""
    return torch.channels_last if config.memory_format == "channels_last" else torch.contiguous_format


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast if configured; weights, their gradients and the optimiser stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


def arrange(model: AnoMem, config: RunConfig) -> None:
    """Put the weights into their memory format and compile the encoder if configured, in place."""
    if config.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        model.encoder.compile()
