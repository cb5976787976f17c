"""A memory of learned prototypes, and its conversion from a layer of hflayers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.reference.retrieve import NORMALIZE, Normalize, normalize_rows
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require, require_choice, require_count, require_number, require_tensor


class HopfieldMemory(nn.Module):
    """Learned prototypes read by modern-Hopfield retrieval (AnoMem Eq. 1; Ramsauer et al. 2021).

    Replaces `HopfieldLayer` of hflayers (https://github.com/ml-jku/hopfield-layers; https://arxiv.org/abs/2008.02217)
    in static single-head mode (no projections, no affine): patterns are LayerNormed, association is scaled by beta,
    the answer is a mean of the normalised prototypes. There beta is 1 unless `scaling` is given; `from_hopfield_layer`
    converts a layer, docs/MIGRATING.md has its arguments.

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
        shrink: MemAE's hard-shrinkage threshold; 0 is off. Set `memory.shrink` for a schedule.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        query [..., d] -> [..., d] (or [..., dv]).

    Attributes:
        prototypes: [M, d] parameter, drawn from N(0, 1).
        values: [M, dv] parameter or None.

    Raises:
        ArgumentError: a wrong number or name.
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
        require_choice(impl, "impl", IMPLEMENTATIONS)
        require_number(shrink, "shrink")
        right = not isinstance(shrink, Tensor) and 0 <= shrink < 1
        require(right, "shrink", "a number in [0, 1)", shrink, "set `memory.shrink` to change it while training")
        if beta is None:
            beta = features**-0.5
        require_number(beta, "beta")
        require(not isinstance(beta, Tensor), "beta", "a number", beta, "use learn_beta=True")
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
            self._checked(query), self.prototypes, shrink=self.shrink, impl=self.impl, **self._options()
        )
        return retrieved

    def energy(self, query: Tensor) -> Tensor:
        """−lse/beta, the Hopfield energy up to terms in |q|²: [..., d] -> [...]."""
        # Without the values, on which the energy does not depend: they get no gradient, also from a compiled graph.
        options = {**self._options(), "values": None}
        _, lse = AF.hopfield_retrieve(self._checked(query), self.prototypes, return_lse=True, impl=self.impl, **options)
        energy: Tensor = -lse / self.beta
        return energy

    def deviation(self, query: Tensor) -> Tensor:
        """norm(q) − HF(q): [..., d] -> [..., d]."""
        query = self._checked(query)
        return AF.deviation(query, self.prototypes, shrink=self.shrink, impl=self.impl, **self._options())

    def diagnostics(self, query: Tensor) -> AF.MemoryDiagnostics:
        """Usage of the prototypes over a set of queries [..., d], in their first read and before any shrinkage."""
        return AF.memory_diagnostics(
            self._checked(query), self.prototypes, beta=self.beta, normalize=self.normalize, impl=self.impl, part=True
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `print(module)`."""
        count, features = self.prototypes.shape
        beta = "learned" if isinstance(self.beta, Tensor) else f"{self.beta:.4g}"
        parts = [f"{features}, {count}", f"beta={beta}", f"steps={self.steps}", f"normalize={self.normalize!r}"]
        if self.values is not None:
            parts.append(f"value_features={self.values.shape[1]}")
        if self.shrink != 0:
            parts.append(f"shrink={float(self.shrink):.4g}")
        return ", ".join(parts if self.impl == "auto" else [*parts, f"impl={self.impl!r}"])

    def _checked(self, query: Tensor) -> Tensor:
        """Queries of the memory's features; what else they must be the functions check."""
        features = self.prototypes.shape[1]
        fits = not isinstance(query, Tensor) or query.dim() == 0 or query.shape[-1] == features
        require(fits, "query", lambda: f"[..., {features}], the memory's features", query)
        return query

    def _options(self) -> dict[str, Any]:
        return {"values": self.values, "beta": self.beta, "steps": self.steps, "normalize": self.normalize}


def from_hopfield_layer(layer: Any) -> nn.Sequential:
    """The same function as an `hflayers.HopfieldLayer` of one head, with its weights.

    What does not depend on the query is computed once: the projections of the stored patterns become prototypes, those
    of the pattern projections and of the output become values. (Retrieval weights sum to one, so biases pass through.)
    The module learns on in these folded weights. A layer without any projection keeps its tied patterns.

        layer = hflayers.HopfieldLayer(input_size=32, quantity=16)
        memory = from_hopfield_layer(layer)
        memory(query)  # [..., 32], as layer(query)

    Args:
        layer: any options but several heads, dropout, `concat_bias_pattern` and `update_steps_max=None`.

    Returns:
        Of the layer's dtype and device, [..., input_size] -> [..., output_size]; its parts are the normalisation and
        the projection of the query, a `HopfieldMemory` and the activation, those that the layer has.

    Raises:
        ArgumentError: names the option of the layer that has no counterpart.
    """
    hopfield: Any = getattr(layer, "hopfield", None)
    core: Any = getattr(hopfield, "association_core", None)
    known = core is not None and isinstance(getattr(layer, "lookup_weights", None), Tensor)
    require(known, "layer", "an hflayers.HopfieldLayer", type(layer).__name__)
    require(core.num_heads == 1, "num_heads", "1", core.num_heads, "a memory reads with one head")
    require(core.dropout == 0, "dropout", "0", core.dropout, "a memory has no dropout; set it to 0 to convert")
    biased = core.bias_k is None and core.bias_v is None
    require(biased, "concat_bias_pattern", "False", True, "a memory has no bias patterns")
    updates = hopfield.update_steps_max
    require(updates is not None and int(updates) >= 0, "update_steps_max", "a number of updates", updates)
    stops = int(updates) > 1 and float(hopfield.update_steps_eps) > 1e-3
    require(not stops, "update_steps_eps", "at most 1e-3", hopfield.update_steps_eps, "a memory never stops early")
    scaling = 1.0 if hopfield.scaling is None else float(hopfield.scaling)
    with torch.no_grad():
        parts = _folded(layer, hopfield, core, scaling, int(updates) + 1)
    return nn.Sequential(*parts).to(layer.lookup_weights)


def _folded(layer: Any, hopfield: Any, core: Any, scaling: float, steps: int) -> list[nn.Module]:
    """The parts of the module that `from_hopfield_layer` returns."""
    lookup, separate = layer.lookup_weights, layer.target_weights
    stored = lookup.reshape(-1, lookup.shape[-1])  # [M, d], of [1, M, d] or, without batch_first, [M, 1, d]
    target = stored if separate is None else separate.reshape(-1, separate.shape[-1])
    norms = hopfield.norm_state_pattern, hopfield.norm_stored_pattern, hopfield.norm_pattern_projection
    maps = _projections(core)
    activation = [] if hopfield.association_activation is None else [_Activation(hopfield.association_activation)]

    def memory(keys: Tensor, values: Tensor | None, normalize: Normalize) -> HopfieldMemory:
        count, width = keys.shape
        value_features = None if values is None else values.shape[1]
        result = HopfieldMemory(
            width, count, beta=scaling, steps=steps, normalize=normalize, value_features=value_features
        ).to(keys)
        result.prototypes.copy_(keys)
        result.prototypes.requires_grad_(lookup.requires_grad)
        if result.values is not None and values is not None:
            result.values.copy_(values)
            result.values.requires_grad_((lookup if separate is None else separate).requires_grad)
        return result

    bare = separate is None and not any(maps) and not core.normalize_pattern and not core.add_zero_attn
    if bare and core.out_proj is None and all(norm is None for norm in norms):
        return [memory(stored, None, "none"), *activation]
    plain = all(norm is not None and norm.weight is None and norm.eps == 1e-5 for norm in norms)
    if bare and core.out_proj is None and plain:
        return [memory(stored, None, "layer"), *activation]

    query_map, key_map, value_map = maps
    keys, values = (x if norm is None else norm(x) for x, norm in zip((stored, target), norms[1:], strict=True))
    if core.value_as_connected and key_map is not None:
        values = key_map(values)
    keys, values = (x if map is None else map(x) for x, map in ((keys, key_map), (values, value_map)))
    space = _norm_of_the_association_space(core, keys)
    keys = keys if space is None else space(keys)
    if core.add_zero_attn:
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
    if core.out_proj is not None:
        values = core.out_proj(values)
    before = [copy.deepcopy(part) for part in (norms[0], query_map, space) if part is not None]
    return [*before, memory(keys, values, "none"), *activation]


def _projections(core: Any) -> list[nn.Linear | None]:
    """Of query, key and value, None where it is static. They are stacked in one matrix, or separate."""
    static = core.query_as_static, core.key_as_static, core.value_as_static
    if core.in_proj_weight is not None:
        # One matrix where all are of one size: rows of the projections that are not static.
        weights = iter(core.in_proj_weight.chunk(3 - sum(static)))
        matrices = [None if fixed else next(weights) for fixed in static]
    else:
        matrices = [core.q_proj_weight, core.k_proj_weight, core.v_proj_weight]
    maps: list[nn.Linear | None] = []
    start = 0
    for matrix in matrices:
        if matrix is None:
            maps.append(None)
            continue
        width, features = matrix.shape
        linear = nn.Linear(features, width, bias=core.in_proj_bias is not None).to(matrix)
        linear.weight.copy_(matrix)
        if core.in_proj_bias is not None:
            linear.bias.copy_(core.in_proj_bias[start : start + width])
        start += width
        maps.append(linear)
    return maps


def _norm_of_the_association_space(core: Any, keys: Tensor) -> nn.LayerNorm | None:
    """`normalize_hopfield_space`, of projected queries and keys."""
    if not core.normalize_pattern:
        return None
    affine = core.p_norm_weight is not None
    norm = nn.LayerNorm(keys.shape[1], getattr(core, "normalize_pattern_eps", 1e-5), elementwise_affine=affine).to(keys)
    if affine:
        norm.weight.copy_(core.p_norm_weight)
        norm.bias.copy_(core.p_norm_bias)
    return norm


class _Activation(nn.Module):
    """`association_activation`, a function of torch."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
