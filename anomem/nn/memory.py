"""A memory of learned prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.backends import Impl
from anomem.reference.retrieve import NORMALIZE, Normalize, normalize_rows
from anomem.validation import require, require_choice, require_count, require_number, require_tensor


class HopfieldMemory(nn.Module):
    """Learned prototypes read by modern-Hopfield retrieval (AnoMem Eq. 1; Ramsauer et al. 2021).

    Replaces `HopfieldLayer` of hflayers (https://github.com/ml-jku/hopfield-layers; https://arxiv.org/abs/2008.02217)
    in static single-head mode (no projections, no affine): patterns are LayerNormed, association is scaled by beta,
    the answer is a mean of the normalised prototypes. There beta is 1 unless `scaling` is given; docs/MIGRATING.md has
    the other arguments and the conversion of a layer with projections.

        memory = HopfieldMemory(features=128, prototypes=64)
        retrieved = memory(query)  # [..., 128] -> [..., 128]
        novelty = memory.deviation(query).norm(dim=-1)  # [...]

    Args:
        features: d, length of a query.
        prototypes: M, how many patterns are stored.
        beta: inverse temperature; 1/sqrt(d) when None.
        steps: number of reads ≥ 1; all but the last update the query.
        normalize: "layer", "l2" or "none".
        learn_beta: make beta a parameter.
        value_features: dv of a separate, learned value matrix; None reads the normalised prototypes.
        shrink: MemAE's hard-shrinkage threshold; 0 is off.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        query [..., d] -> [..., d] (or [..., dv]).

    Attributes:
        prototypes: [M, d] parameter, drawn from N(0, 1).
        values: [M, dv] parameter or None.
    """

    def __init__(
        self,
        features: int,
        prototypes: int,
        *,
        beta: float | None = None,
        steps: int = 1,
        normalize: Normalize = "layer",
        learn_beta: bool = False,
        value_features: int | None = None,
        shrink: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        require_count(features, "features", 1)
        require_count(prototypes, "prototypes", 1)
        require_count(steps, "steps", 1)
        require_choice(normalize, "normalize", NORMALIZE)
        require_number(shrink, "shrink")
        if beta is None:
            beta = features**-0.5
        require_number(beta, "beta")
        if value_features is not None:
            require_count(value_features, "value_features", 1)
        self.steps = steps
        self.normalize = normalize
        self.shrink = float(shrink)
        self.impl: Impl = impl
        self.prototypes = nn.Parameter(torch.empty(prototypes, features))
        self.values = None if value_features is None else nn.Parameter(torch.empty(prototypes, value_features))
        self.beta: float | Tensor = nn.Parameter(torch.tensor(float(beta))) if learn_beta else float(beta)
        self._initial_beta = float(beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw prototypes (and values) from N(0, 1) and set beta back."""
        with torch.no_grad():
            self.prototypes.normal_()
            if self.values is not None:
                self.values.normal_()
            if isinstance(self.beta, nn.Parameter):
                self.beta.fill_(self._initial_beta)

    @torch.no_grad()
    def fill(self, features: Tensor, generator: torch.Generator | None = None) -> None:
        """Replace the prototypes by distinct rows of a feature set, drawn at random.

        Separate values become the same rows, normalised, so that a filled memory reads alike with and without them.

        Args:
            features: [N, d], N ≥ 1. With fewer rows than prototypes, rows repeat.
            generator: source of randomness, on the device of `features`.

        Raises:
            ArgumentError: `features` is no floating tensor of the queries' width, or the memory has values of another
                width, which features cannot fill.
        """
        prototypes, width = self.prototypes.shape
        require_tensor(features, "features", (2,), "[N, d]")
        rows = features.shape[0]
        right = features.shape[1] == width and rows > 0
        require(right, "features", lambda: f"[N, {width}] with N ≥ 1", features)
        values = self.values
        fits = values is None or values.shape[1] == width
        require(fits, "values", lambda: f"of the queries' width {width}, to be filled with features", values)
        order = torch.randperm(rows, generator=generator, device=features.device)
        self.prototypes.copy_(features[order[torch.arange(prototypes, device=features.device) % rows]])
        if values is not None:
            values.copy_(normalize_rows(self.prototypes, self.normalize))

    def forward(self, query: Tensor) -> Tensor:
        """What the memory returns for each query: [..., d] -> [..., d] (or [..., dv])."""
        retrieved: Tensor = AF.hopfield_retrieve(
            query, self.prototypes, shrink=self.shrink, impl=self.impl, **self._options()
        )
        return retrieved

    def energy(self, query: Tensor) -> Tensor:
        """−lse/beta, the Hopfield energy up to terms in |q|²: [..., d] -> [...]."""
        _, lse = AF.hopfield_retrieve(query, self.prototypes, return_lse=True, impl=self.impl, **self._options())
        energy: Tensor = -lse / self.beta
        return energy

    def deviation(self, query: Tensor) -> Tensor:
        """norm(q) − HF(q): [..., d] -> [..., d]."""
        return AF.deviation(query, self.prototypes, shrink=self.shrink, impl=self.impl, **self._options())

    def diagnostics(self, query: Tensor) -> AF.MemoryDiagnostics:
        """Usage of the prototypes over a set of queries [..., d]."""
        return AF.memory_diagnostics(
            query, self.prototypes, beta=self.beta, normalize=self.normalize, impl=self.impl, part=True
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `print(module)`."""
        count, features = self.prototypes.shape
        beta = "learned" if isinstance(self.beta, Tensor) else f"{self.beta:.4g}"
        return f"{features}, {count}, beta={beta}, steps={self.steps}, normalize={self.normalize!r}"

    def _options(self) -> dict[str, Any]:
        return {"values": self.values, "beta": self.beta, "steps": self.steps, "normalize": self.normalize}
