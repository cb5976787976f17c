"""How a run executes where its configuration says "auto": precision, memory format and compilation, by rule.

The rules quote benchmarks/results/cpu-execution.jsonl (AMD family 25) and cpu-amx-execution.jsonl (Intel family 6);
`python -m benchmarks.profile_training` measures another machine. Not measured on a GPU yet.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from anomem.errors import UserError
from anomem.models import AnoMem
from anomem.train.config import RunConfig, TrainConfig
from anomem.train.ranks import Ranks


def settled(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The same configuration without "auto" in its execution; a run keeps this one, so that a resumption is the same.

    Warns where the encoder is to be compiled and cannot be.

    Args:
        config: of the run.
        device: of the model.

    Raises:
        UserError: bf16 is asked for on a device that has none.
    """
    run = config.run
    precision, layout, compiled = run.precision, run.memory_format, run.compile
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device.type) else "float32"
    if layout == "auto":
        layout = "channels_last" if device.type in ("cpu", "cuda") else "contiguous"
    if precision == "bf16" and device.type not in ("cpu", "cuda"):
        raise UserError(f"`run.precision`: bf16 runs on cpu and cuda, received the device {device.type}; take float32")
    if compiled == "auto":
        compiled = False  # a step of the small encoder gains 4 % (cpu-execution.jsonl)
    if compiled:
        reason = _not_compiled(config) or compiler_obstacle(device.type)
        if reason is not None:
            warnings.warn(f"anomem: `run.compile`: stage 1 runs uncompiled: {reason}", RuntimeWarning, stacklevel=2)
        compiled = reason is None
    return replace(config, run=replace(run, precision=precision, memory_format=layout, compile=compiled))


def _not_compiled(config: TrainConfig) -> str | None:
    """Why stage 1 of a configuration cannot run compiled."""
    if Ranks.current().count > 1:
        return "several processes exchange batch-norm statistics within the encoder"
    if config.optimizer.micro_batch is not None:
        return "micro-batches are encoded twice, and compiled passes draw other dropout"
    if config.optimizer.accumulate > 1:
        return "parts of a batch differ in size, and each size would be compiled"
    return None


@functools.cache
def compiler_obstacle(device: str) -> str | None:
    """Why torch.compile makes no code for a kind of device here, found by a trial of seconds; None where it does."""
    try:
        torch.compile(torch.neg)(torch.zeros(16, device=device))
    except (RuntimeError, OSError) as error:  # its own errors are RuntimeErrors
        return str(error).strip().splitlines()[0]
    return None


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
    """Put the weights into their memory format, in place; on CPUs freed memory stays with the process."""
    if config.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if model.device.type == "cpu":
        keep_freed_memory()


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc reuse the maps of a step in the next one; given back, their pages are faulted in and zeroed again.

    Blocks come from the heap, whatever their size, and the heap does not shrink. By itself glibc maps blocks of 32 MiB
    and more anew each time. Other libraries keep their own rules.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(option, value)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h. A threshold from which blocks are mapped, M_MMAP_THRESHOLD, may be 32 MiB at most."""
