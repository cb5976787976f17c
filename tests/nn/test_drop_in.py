"""The layers stand where people now use hflayers, lightly and pytorch-metric-learning: same numbers, same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError
from anomem.testing import draw


def lightly_formula(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss without memory bank, from its definition: cross-entropy over 2B − 1 logits, self removed."""
    batch = z0.shape[0]
    unit = torch.cat([torch.nn.functional.normalize(z, dim=1) for z in (z0, z1)])
    logits = unit @ unit.T / temperature
    others = ~torch.eye(2 * batch, dtype=torch.bool)
    logits = logits[others].view(2 * batch, -1)
    labels = torch.cat([torch.arange(batch) + batch - 1, torch.arange(batch)])
    return torch.nn.functional.cross_entropy(logits, labels)


def metric_learning_formula(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="the extra `peers` is not installed")
    labels = torch.arange(z0.shape[0]).repeat(2)
    loss: Tensor = losses.NTXentLoss(temperature=temperature)(torch.cat([z0, z1]), labels)
    return loss


@pytest.mark.parametrize("peer", [lightly_formula, metric_learning_formula])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_loss_equals_its_peers(peer: Callable[[Tensor, Tensor, float], Tensor], temperature: float) -> None:
    views = [draw(6, 16, seed=s).double() for s in (0, 1)]
    ours = [v.clone().requires_grad_() for v in views]
    peers = [v.clone().requires_grad_() for v in views]
    loss = ann.NTXentLoss(temperature)(*ours)
    expected = peer(*peers, temperature)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, peers), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_info_nce_loss_equals_cross_entropy() -> None:
    images, texts = (torch.nn.functional.normalize(draw(5, 8, seed=s).double(), dim=1) for s in (0, 1))
    expected = torch.nn.functional.cross_entropy(images @ texts.T / 0.07, torch.arange(5))
    torch.testing.assert_close(ann.InfoNCELoss(0.07)(images, texts), expected)


def test_hopfield_memory_equals_static_single_head_association() -> None:
    """hflayers' static mode without projections: state and stored pattern LayerNormed, softmax(beta q Kᵀ) V."""
    memory = ann.HopfieldMemory(16, 6).double()
    query = draw(3, 4, 16).double()
    norm = torch.nn.LayerNorm(16, elementwise_affine=False).double()
    patterns = norm(memory.prototypes)
    expected = torch.softmax(norm(query) @ patterns.T / 4, dim=-1) @ patterns
    torch.testing.assert_close(memory(query), expected)


def test_learned_parameters_receive_gradients() -> None:
    memory = ann.HopfieldMemory(8, 4, learn_beta=True, value_features=3, steps=2)
    criterion = ann.NTXentLoss(learn_temperature=True)
    out = memory(draw(5, 8))
    assert out.shape == (5, 3)
    criterion(out, draw(5, 3, seed=1)).backward()
    for name, parameter in [*memory.named_parameters(), *criterion.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_reset_draws_anew_and_sets_beta_back() -> None:
    memory = ann.HopfieldMemory(8, 4, beta=2.0, learn_beta=True)
    before = memory.prototypes.detach().clone()
    with torch.no_grad():
        memory.beta.fill_(7.0)  # type: ignore[union-attr]
    memory.reset_parameters()
    assert memory.beta.detach() == 2.0  # type: ignore[union-attr]
    assert not torch.equal(memory.prototypes, before)


def test_a_model_made_on_the_meta_device_is_reset_where_it_lands() -> None:
    with torch.device("meta"):
        layers = torch.nn.ModuleList(
            [ann.HopfieldMemory(8, 4, beta=2.0, learn_beta=True), ann.NTXentLoss(0.3, learn_temperature=True)]
        )
    layers.to_empty(device="cpu")
    for module in layers.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    memory, criterion = layers
    assert memory.beta.detach() == 2.0
    assert memory.prototypes.isfinite().all()
    torch.testing.assert_close(
        criterion(draw(3, 8), draw(3, 8, seed=1)), ann.NTXentLoss(0.3)(draw(3, 8), draw(3, 8, seed=1))
    )


def test_fill_takes_distinct_rows_and_repeats_when_there_are_too_few() -> None:
    features = torch.arange(6.0)[:, None].expand(6, 3)
    memory = ann.HopfieldMemory(3, 6)
    memory.fill(features)
    assert memory.prototypes[:, 0].sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    memory.fill(features[:2])
    assert memory.prototypes[:, 0].sort().values.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_memory_that_was_filled_reads_alike_with_separate_values() -> None:
    features, query = draw(20, 8), draw(5, 8)
    for normalize in ("none", "l2", "layer"):
        tied = ann.HopfieldMemory(8, 6, normalize=normalize)
        separate = ann.HopfieldMemory(8, 6, normalize=normalize, value_features=8)
        for memory in (tied, separate):
            memory.fill(features, torch.Generator().manual_seed(0))
        torch.testing.assert_close(separate(query), tied(query))


def test_a_memory_is_saved_loaded_and_copied() -> None:
    memory = ann.HopfieldMemory(8, 4, learn_beta=True)
    other = ann.HopfieldMemory(8, 4, learn_beta=True)
    other.load_state_dict(memory.state_dict())
    query = draw(2, 8)
    assert torch.equal(other(query), memory(query))
    assert torch.equal(copy.deepcopy(memory)(query), memory(query))


def test_diagnostics_tell_soft_averaging_from_a_memory_in_use() -> None:
    query = draw(400, 16)
    averaging = ann.HopfieldMemory(16, 8, beta=1e-3).diagnostics(query)
    sharp = ann.HopfieldMemory(16, 8, beta=50.0).diagnostics(query)
    assert averaging.perplexity > 7.9
    assert averaging.mean_length > 0.99
    assert sharp.perplexity < 1.2
    assert sharp.effective > 4
    assert int(sharp.usage.sum()) == 400


def test_the_scale_loss_reads_the_memory_as_the_memory_reads_itself() -> None:
    memory = ann.HopfieldMemory(8, 6, shrink=0.25)
    z, z_pair = draw(3, 4, 8), draw(3, 4, 8, seed=1)
    criterion = ann.ContrastedMemoryLoss(0.2, symmetric=False)
    _, contrast, variance = criterion(z, z_pair, memory)
    torch.testing.assert_close(contrast, AF.nt_xent(z, memory(z_pair), temperature=0.2))
    torch.testing.assert_close(variance, AF.variance_hinge(memory(z_pair)))
    memory.shrink = 0.0
    assert not torch.equal(criterion(z, z_pair, memory)[1], contrast)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (ann.NTXentLoss(0.2), "NTXentLoss(temperature=0.2)"),
        (ann.InfoNCELoss(learn_temperature=True, impl="reference"), "temperature=learned, impl='reference')"),
        (ann.NTXentLoss(0.2, gather_distributed=True, ring=True), "gather_distributed=True, ring=True)"),
        (ann.VarianceHinge(0.5), "VarianceHinge(gamma=0.5, eps=0.0001)"),
        (ann.ContrastedMemoryLoss(), "temperature=0.2, variance_weight=0.05, negatives='image', symmetric=True)"),
        (ann.HopfieldMemory(8, 4, value_features=3, shrink=0.1), "normalize='layer', value_features=3, shrink=0.1)"),
    ],
)
def test_a_layer_prints_what_it_computes(layer: torch.nn.Module, text: str) -> None:
    assert repr(layer).endswith(text)


def test_the_scale_loss_weighs_its_two_terms() -> None:
    memory = ann.HopfieldMemory(8, 4)
    total, contrast, variance = ann.ContrastedMemoryLoss(variance_weight=0.3)(
        draw(2, 5, 8), draw(2, 5, 8, seed=1), memory
    )
    torch.testing.assert_close(total, contrast + 0.3 * variance)


def test_nt_xent_loss_takes_lightlys_arguments() -> None:
    z0, z1 = draw(6, 16), draw(6, 16, seed=1)
    for criterion in (
        ann.NTXentLoss(0.3, 0, False),
        ann.NTXentLoss(0.3, memory_bank_size=0),
        ann.NTXentLoss(0.3, memory_bank_size=(0, 16), gather_distributed=True),
    ):
        torch.testing.assert_close(criterion(out0=z0, out1=z1), lightly_formula(z0, z1, 0.3))
        assert criterion.temperature == 0.3
        criterion.temperature = 0.7
        assert criterion.temperature == 0.7
        torch.testing.assert_close(criterion(z0, z1), lightly_formula(z0, z1, 0.7))


def test_a_learned_temperature_is_read_and_set() -> None:
    criterion = ann.InfoNCELoss(0.3, learn_temperature=True)
    assert dict(criterion.named_parameters()).keys() == {"log_temperature"}
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.3))
    criterion.temperature = 0.5
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.5))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("memory_bank_size", lambda: ann.NTXentLoss(memory_bank_size=4096)),
        ("memory_bank_size", lambda: ann.NTXentLoss(memory_bank_size=(4096, 128))),
        ("temperature", lambda: setattr(ann.NTXentLoss(), "temperature", 0.0)),
        ("out0", lambda: ann.NTXentLoss()(torch.empty(0, 4), torch.empty(0, 4))),
        ("out0", lambda: ann.NTXentLoss()(draw(5, 1, 4), draw(5, 1, 4))),
        ("out1", lambda: ann.NTXentLoss()(draw(5, 4), draw(4, 4))),
        ("out1", lambda: ann.NTXentLoss()(draw(5, 4), draw(5, 4).double())),
        ("query", lambda: ann.HopfieldMemory(4, 9)(draw(5, 3))),
        ("query", lambda: ann.HopfieldMemory(4, 9).energy(draw(5, 3))),
        ("query", lambda: ann.HopfieldMemory(4, 9).deviation(draw(5, 3))),
        ("query", lambda: ann.HopfieldMemory(4, 9).diagnostics(draw(5, 3))),
        ("rows", lambda: ann.InfoNCELoss()(torch.empty(0, 4), draw(3, 4))),
        ("rows", lambda: ann.InfoNCELoss()(draw(5, 1, 4), draw(5, 1, 4))),
        ("out0", lambda: ann.NTXentLoss(gather_distributed=True)(torch.empty(0, 4), torch.empty(0, 4))),
        ("out0", lambda: ann.NTXentLoss(gather_distributed=True)(draw(5, 1, 4), draw(5, 1, 4))),
        ("rows", lambda: ann.InfoNCELoss(gather_distributed=True)(draw(5, 1, 4), draw(5, 1, 4))),
        (
            "exclude",
            lambda: ann.InfoNCELoss(gather_distributed=True)(draw(5, 4), draw(5, 4), exclude=torch.arange(5)),
        ),
    ],
)
def test_a_call_that_could_only_be_a_mistake_is_refused(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert raised.value.argument == argument


def test_processes_need_a_torch_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    ann.NTXentLoss()
    with pytest.raises(ArgumentError, match="gather_distributed"):
        ann.NTXentLoss(gather_distributed=True)


class StandInLayer(torch.nn.Module):
    """The attributes of an hflayers.HopfieldLayer of one head, and its formula; hflayers is not on PyPI."""

    def __init__(
        self,
        *,
        width: int = 7,
        value_width: int = 5,
        static: tuple[bool, bool, bool] = (False, False, False),
        stacked: bool = False,
        bias: bool = True,
        affine: bool = True,
        normalize: bool = True,
        space: str = "",
        connected: bool = False,
        zero: bool = False,
        project: bool = True,
        separate: bool = False,
        activation: str = "",
        batch_first: bool = True,
        **given: Any,
    ) -> None:
        super().__init__()
        features, count = 12, 6
        shape = (1, count, features) if batch_first else (count, 1, features)
        self.lookup_weights = torch.nn.Parameter(torch.empty(shape))
        self.target_weights = torch.nn.Parameter(torch.empty(shape)) if separate else None
        self.hopfield = hopfield = torch.nn.Module()
        hopfield.association_core = core = torch.nn.Module()
        for norm in ("norm_stored_pattern", "norm_state_pattern", "norm_pattern_projection"):
            setattr(hopfield, norm, torch.nn.LayerNorm(features, elementwise_affine=affine) if normalize else None)
        hopfield.scaling, hopfield.update_steps_max, hopfield.update_steps_eps = 0.7, 0, 1e-4
        hopfield.association_activation = getattr(torch, activation) if activation else None
        core.num_heads, core.dropout, core.bias_k, core.bias_v = 1, 0.0, None, None
        core.query_as_static, core.key_as_static, core.value_as_static = static
        core.value_as_connected, core.add_zero_attn, core.normalize_pattern = connected, zero, bool(space)
        if stacked:
            width = value_width = features
        inner = width if connected and not static[1] else features
        sizes = [(width, features), (width, features), (value_width, inner)]
        pairs = zip(static, sizes, strict=True)
        maps = [None if fixed else torch.nn.Parameter(torch.empty(size)) for fixed, size in pairs]
        core.q_proj_weight, core.k_proj_weight, core.v_proj_weight = [None] * 3 if stacked else maps
        kept = [x for x in maps if x is not None]
        core.in_proj_weight = torch.nn.Parameter(torch.cat(kept)) if stacked and kept else None
        # As in hflayers a static value keeps its part of the bias, which is not read.
        rows = sum(size[0] for fixed, size in zip(static, sizes, strict=True) if not fixed) + static[2] * value_width
        core.in_proj_bias = torch.nn.Parameter(torch.empty(rows)) if bias and kept else None
        learned = space == "affine"
        core.p_norm_weight, core.p_norm_bias = (
            torch.nn.Parameter(torch.empty(width)) if learned else None for _ in range(2)
        )
        last = value_width if not static[2] else inner
        core.out_proj = torch.nn.Linear(last, 9, bias=bias) if project else None
        for name, value in given.items():
            setattr(core if hasattr(core, name) else hopfield, name, value)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=i, scale=0.5))

    def forward(self, query: Tensor) -> Tensor:
        hopfield, core = self.hopfield, self.hopfield.association_core
        stored = self.lookup_weights.flatten(0, 1)
        target = stored if self.target_weights is None else self.target_weights.flatten(0, 1)
        names = ("norm_state_pattern", "norm_stored_pattern", "norm_pattern_projection")
        norms = [getattr(hopfield, name) for name in names]
        q, k, v = (x if norm is None else norm(x) for x, norm in zip((query, stored, target), norms, strict=True))
        static = core.query_as_static, core.key_as_static, core.value_as_static
        maps = [core.q_proj_weight, core.k_proj_weight, core.v_proj_weight]
        if core.in_proj_weight is not None:
            chunks = iter(core.in_proj_weight.split(12))
            maps = [None if fixed else next(chunks) for fixed in static]
        rest, biases = core.in_proj_bias, []
        for matrix in maps:
            taken = None if matrix is None or rest is None else rest[: len(matrix)]
            rest = rest if taken is None else rest[len(taken) :]
            biases.append(taken)
        linear = torch.nn.functional.linear
        q = q if maps[0] is None else linear(q, maps[0], biases[0])
        if core.value_as_connected and maps[1] is not None:
            v = linear(v, maps[1], biases[1])
        k = k if maps[1] is None else linear(k, maps[1], biases[1])
        v = v if maps[2] is None else linear(v, maps[2], biases[2])
        if core.normalize_pattern:
            q, k = (
                torch.nn.functional.layer_norm(x, x.shape[-1:], core.p_norm_weight, core.p_norm_bias) for x in (q, k)
            )
        if core.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(1, x.shape[1])]) for x in (k, v))
        for _ in range(int(hopfield.update_steps_max) + 1):
            weights = torch.softmax(float(hopfield.scaling) * q @ k.T, dim=-1)
            q = weights @ k
        out = weights @ v if core.out_proj is None else core.out_proj(weights @ v)
        return out if hopfield.association_activation is None else hopfield.association_activation(out)


LAYERS: list[dict[str, Any]] = [
    {},
    {"stacked": True},
    {"stacked": True, "static": (False, True, False)},
    {"separate": True},
    {"bias": False},
    {"affine": False},
    {"normalize": False},
    {"project": False},
    {"connected": True},
    {"connected": True, "static": (False, False, True)},
    {"connected": True, "static": (False, True, False), "width": 12},
    {"zero": True},
    {"space": "plain"},
    {"space": "affine", "zero": True, "update_steps_max": torch.tensor([2])},
    {"activation": "tanh"},
    {"batch_first": False},
    {"scaling": torch.tensor([0.4])},
    {"scaling": None},
    {"static": (True, True, True), "project": False, "affine": False},
    {"static": (True, True, True), "project": False, "normalize": False, "update_steps_max": 1},
    {"static": (True, True, True), "project": False, "separate": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_of_hflayers_is_converted(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer, query = StandInLayer(**options).to(dtype), draw(3, 4, 12, dtype=dtype)
    if options.get("scaling", 0) is None:
        layer.hopfield.scaling = None
        expected_layer = StandInLayer(**{**options, "scaling": 1.0}).to(dtype)
    else:
        expected_layer = layer
    memory = ann.from_hopfield_layer(layer)
    got = memory(query)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected_layer(query))
    tied = all(options.get("static", (False,))) and not options.get("separate")
    assert any(isinstance(part, ann.HopfieldMemory) and (part.values is None) == tied for part in memory)


def test_a_bfloat16_layer_is_converted() -> None:
    layer, query = StandInLayer().bfloat16(), draw(3, 4, 12, dtype=torch.bfloat16)
    got = ann.from_hopfield_layer(layer)(query)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, layer(query), rtol=0.05, atol=0.05)


def test_frozen_patterns_stay_frozen() -> None:
    layer = StandInLayer()
    layer.lookup_weights.requires_grad_(False)
    memory = ann.from_hopfield_layer(layer)
    assert {name for name, x in memory.named_parameters() if not x.requires_grad} == {"2.prototypes", "2.values"}


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("num_heads", {"num_heads": 2}),
        ("dropout", {"dropout": 0.1}),
        ("concat_bias_pattern", {"bias_k": torch.ones(1)}),
        ("update_steps_max", {"update_steps_max": None}),
        ("update_steps_max", {"update_steps_max": -1}),
        ("update_steps_eps", {"update_steps_max": 3, "update_steps_eps": 0.1}),
    ],
)
def test_a_layer_that_cannot_be_converted_names_its_option(option: str, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as raised:
        ann.from_hopfield_layer(StandInLayer(**given))
    assert raised.value.argument == option


def test_another_layer_is_refused() -> None:
    with pytest.raises(ArgumentError, match="HopfieldLayer"):
        ann.from_hopfield_layer(torch.nn.Linear(2, 2))
