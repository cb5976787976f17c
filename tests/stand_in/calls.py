"""The package's functions on a GPU, forward and backward, each scheme of each kernel once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.ops import native
from anomem.rules import Impl

Shapes = list[tuple[int, ...]]
HAVE_NATIVE = native.obstacle("cuda") is None


class Call:
    """A function, its inputs on a GPU and upstream gradients: forward and backward as often as wanted."""

    def __init__(self, function: Callable[..., Any], shapes: Shapes, dtype: torch.dtype, device: str = "cuda") -> None:
        self.function = function
        self.inputs = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
        self.upstream = [torch.zeros_like(out) for out in self.forward()]

    def forward(self) -> tuple[Tensor, ...]:
        out = self.function(*self.inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def __call__(self) -> list[Tensor]:
        outputs = self.forward()
        if not outputs[0].requires_grad:
            return list(outputs)
        return [*outputs, *torch.autograd.grad(outputs, self.inputs, self.upstream)]


def retrieve(impl: Impl) -> Callable[..., Any]:
    def call(query: Tensor, prototypes: Tensor, values: Tensor | None = None) -> Any:
        return AF.hopfield_retrieve(query, prototypes, values=values, normalize="layer", return_lse=True, impl=impl)

    return call


def nt_xent(z: Tensor, z_pair: Tensor, temperature: Tensor | None = None) -> Tensor:
    return AF.nt_xent(z, z_pair, temperature=0.2 if temperature is None else temperature, impl="triton")


def info_nce(rows: Tensor, columns: Tensor) -> Tensor:
    positive = torch.arange(rows.shape[-2], device=rows.device)
    return AF.info_nce(rows, columns, positive, temperature=0.1, impl="triton")


def gather(feature_map: Tensor) -> Tensor:
    positions = torch.arange(20, device=feature_map.device)
    return AF.gather_positions(feature_map, positions, normalize=True, impl="native")


def variance(x: Tensor) -> Tensor:
    return AF.variance_hinge(x, impl="native")


@torch.no_grad()
def deviation_map(feature_map: Tensor, prototypes: Tensor) -> Tensor:
    return AF.deviation_map(feature_map, prototypes, impl="native")


def read(query: Tensor, prototypes: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    found = AF.read_memory(query, prototypes, bias=bias.float(), top_k=3, nearest=True, impl="triton")
    return found.out, found.residual, found.cosine, found.entropy, found.lse


@torch.no_grad()
def nearest(x: Tensor, prototypes: Tensor) -> Tensor:
    return AF.nearest(x, prototypes, k=3, impl="triton").distance


@torch.no_grad()
def k_center(x: Tensor) -> Tensor:
    return AF.k_center(x, 3, impl="triton")


# The retrieval's schemes by Triton are flash, resident scores and, where the library multiplies matrices, chunks.
TRITON: dict[str, tuple[Callable[..., Any], Shapes]] = {
    "retrieve": (retrieve("triton"), [(300, 64), (40, 64)]),
    "retrieve separate": (retrieve("triton"), [(300, 64), (40, 64), (40, 24)]),
    "retrieve d=256": (retrieve("triton"), [(300, 256), (40, 256)]),
    "retrieve d=512": (retrieve("triton"), [(300, 512), (200, 512)]),
    "retrieve d=1024": (retrieve("triton"), [(300, 1024), (2000, 1024)]),
    "read": (read, [(300, 64), (40, 64), (40,)]),
    "nearest": (nearest, [(300, 64), (40, 64)]),
    "k_center": (k_center, [(300, 64)]),
    "nt_xent": (nt_xent, [(4, 65, 100), (4, 65, 100)]),
    "nt_xent learned": (nt_xent, [(4, 65, 100), (4, 65, 100), ()]),
    "info_nce": (info_nce, [(65, 100), (90, 100)]),
}
NATIVE: dict[str, tuple[Callable[..., Any], Shapes]] = {
    "native retrieve": (retrieve("native"), [(300, 64), (40, 64)]),
    "native retrieve separate": (retrieve("native"), [(300, 64), (40, 64), (40, 24)]),
    "native retrieve d=1024": (retrieve("native"), [(300, 1024), (2000, 1024)]),
    "native gather": (gather, [(8, 64, 6, 6)]),
    "native variance": (variance, [(4, 65, 100)]),
    "native deviation map": (deviation_map, [(8, 64, 6, 6), (40, 64)]),
}
CALLS = {**TRITON, **(NATIVE if HAVE_NATIVE else {})}
