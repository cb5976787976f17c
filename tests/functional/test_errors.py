"""Bad input is told in one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError, UserError

Q, K = torch.randn(3, 4), torch.randn(5, 4)
Z = torch.randn(2, 3, 4)
POSITIVE = torch.tensor([0, 1, 2])
MAP = torch.randn(2, 4, 3, 3)

# (argument that must be named, part of the message, call)
CASES: list[tuple[str, str, Callable[[], Any]]] = [
    ("query", "received list", lambda: AF.hopfield_retrieve([1.0], K)),  # type: ignore[call-overload]
    ("query", "received torch.int64", lambda: AF.hopfield_retrieve(torch.ones(3, 4, dtype=torch.int64), K)),
    ("query", "d ≥ 1", lambda: AF.hopfield_retrieve(torch.ones(3, 0), torch.ones(5, 0))),
    ("prototypes", "expected [M, 4]", lambda: AF.hopfield_retrieve(Q, torch.randn(5, 3))),
    ("prototypes", "at least one row", lambda: AF.hopfield_retrieve(Q, torch.randn(0, 4))),
    ("prototypes", "torch.float64", lambda: AF.hopfield_retrieve(Q, K.double())),
    ("values", "[5, dv]", lambda: AF.hopfield_retrieve(Q, K, values=torch.randn(4, 2))),
    ("beta", "received inf", lambda: AF.hopfield_retrieve(Q, K, beta=float("inf"))),
    ("beta", "received nan", lambda: AF.hopfield_retrieve(Q, K, beta=float("nan"))),
    ("beta", "0-dim", lambda: AF.hopfield_retrieve(Q, K, beta=torch.ones(2))),
    ("steps", "integer ≥ 1", lambda: AF.hopfield_retrieve(Q, K, steps=0)),
    ("steps", "received True", lambda: AF.hopfield_retrieve(Q, K, steps=True)),
    ("shrink", "[0, 1)", lambda: AF.hopfield_retrieve(Q, K, shrink=1.0)),
    ("normalize", "'layer', 'l2', 'none'", lambda: AF.hopfield_retrieve(Q, K, normalize="L2")),  # type: ignore[call-overload]
    ("impl", "'auto', 'reference', 'triton', 'native'", lambda: AF.hopfield_retrieve(Q, K, impl="cuda")),  # type: ignore[call-overload]
    ("query", "at least one row", lambda: AF.memory_diagnostics(torch.randn(0, 4), K)),
    ("z_pair", "expected the shape of `z`, [2, 3, 4]", lambda: AF.nt_xent(Z, Z[:1])),
    ("z", "[B, d] or [G, B, d]", lambda: AF.nt_xent(Z[0, 0], Z[0, 0])),
    ("temperature", "a number > 0", lambda: AF.nt_xent(Z, Z, temperature=0.0)),
    ("temperature", "a number > 0", lambda: AF.nt_xent(Z, Z, temperature=-1)),
    ("temperature", "floating", lambda: AF.nt_xent(Z, Z, temperature=torch.tensor(1))),
    ("reduction", "'mean', 'sum', 'none'", lambda: AF.nt_xent(Z, Z, reduction="max")),  # type: ignore[arg-type]
    ("columns", "as `rows`", lambda: AF.info_nce(Z, Z[0], POSITIVE)),
    ("positive", "indices from 0 to 2", lambda: AF.info_nce(Z, Z, torch.tensor([0, 1, 3]))),
    ("positive", "received -1 to 2", lambda: AF.info_nce(Z, Z, torch.tensor([0, -1, 2]))),
    ("positive", "one index per row", lambda: AF.info_nce(Z, Z, POSITIVE[:2])),
    ("positive", "int64", lambda: AF.info_nce(Z, Z, POSITIVE.int())),
    ("exclude", "indices from 0 to 2", lambda: AF.info_nce(Z, Z, POSITIVE, POSITIVE + 1)),
    ("positions", "indices from 0 to 8", lambda: AF.gather_positions(MAP, torch.tensor([9]))),
    ("positions", "a row per image", lambda: AF.gather_positions(MAP, torch.zeros(3, 1, dtype=torch.int64))),
    ("feature_map", "[B, C, H, W]", lambda: AF.gather_positions(Z, torch.tensor([0]))),
    ("x", "at least two rows", lambda: AF.variance_hinge(torch.randn(1, 4))),
    ("gamma", "a number > 0", lambda: AF.variance_hinge(Q, gamma=0)),
    ("log_prior", "[9, 5]", lambda: AF.deviation_map(MAP, K, log_prior=torch.zeros(5, 9))),
    ("distance", "'cosine', 'l2'", lambda: AF.deviation_map(MAP, K, distance="l1")),  # type: ignore[arg-type]
    ("values", "[M, 4]", lambda: AF.deviation(Q, K, values=torch.randn(5, 2))),
    ("z", "at least two images", lambda: AF.contrasted_memory_loss(Z[:, :1], Z[:, :1], K)),
    ("z", "at least one sampled position", lambda: AF.contrasted_memory_loss(Z[:0], Z[:0], K)),
    ("is_normal", "bool [3]", lambda: AF.contrasted_memory_loss(Z, Z, K, is_normal=torch.ones(3))),
    ("features", "integer ≥ 1", lambda: ann.HopfieldMemory(0, 4)),
    ("temperature", "a number > 0", lambda: ann.NTXentLoss(0.0)),
    ("variance_weight", "a number ≥ 0", lambda: ann.ContrastedMemoryLoss(variance_weight=-0.1)),
    ("features", "[N, 4] with N ≥ 1", lambda: ann.HopfieldMemory(4, 2).fill(torch.randn(0, 4))),
    ("features", "received torch.int64", lambda: ann.HopfieldMemory(4, 2).fill(torch.ones(3, 4, dtype=torch.int64))),
    ("features", "received ndarray", lambda: ann.HopfieldMemory(4, 2).fill(torch.ones(3, 4).numpy())),  # type: ignore[arg-type]
    ("query", "received NoneType", lambda: ann.HopfieldMemory(4, 2).diagnostics(None)),  # type: ignore[arg-type]
    ("rows", "received NoneType", lambda: ann.InfoNCELoss()(None, Q)),
    ("columns", "at least 5, one for each row", lambda: ann.InfoNCELoss()(K, Q)),
    ("z", "a dense tensor", lambda: AF.nt_xent(Q.to_sparse(), Q)),
    ("values", "width 4", lambda: ann.HopfieldMemory(4, 2, value_features=3).fill(torch.randn(9, 4))),
    ("values", "[M, d]", lambda: AF.deviation(Q, K, values=torch.tensor(1.0))),
    ("query", "[..., d]", lambda: AF.deviation(torch.tensor(1.0), K, values=K)),
    ("values", "[M, 4]", lambda: AF.contrasted_memory_loss(Z, Z, K, values=torch.randn(5, 2))),
    ("z_pair", "dtype of `z`", lambda: AF.contrasted_memory_loss(Z, Z.double(), K)),
    ("is_normal", "received list", lambda: AF.contrasted_memory_loss(Z, Z, K, is_normal=[True] * 3)),  # type: ignore[arg-type]
    ("count", "integer ≥ 1", lambda: AF.scale_weights(0)),
    ("weighting", "'linear', 'exp'", lambda: AF.scale_weights(3, "quadratic")),  # type: ignore[arg-type]
    ("ratio", "(0, 1]", lambda: AF.sample_positions(4, 4, 1.5)),
    ("ratio", "received nan", lambda: AF.sample_positions(4, 4, float("nan"))),
    ("height", "integer ≥ 1", lambda: AF.sample_positions(0, 4, 0.5)),
    ("batch", "integer ≥ 1", lambda: AF.sample_positions(4, 4, 0.5, batch=0)),
    ("length", "[B]", lambda: AF.margin_loss(Q, torch.ones(3, dtype=torch.bool))),
    ("is_normal", "bool [3]", lambda: AF.margin_loss(Q[:, 0], torch.ones(2, dtype=torch.bool))),
    ("margin", "≥ 1", lambda: AF.margin_loss(Q[:, 0], torch.ones(3, dtype=torch.bool), 0.5)),
    ("memory_bank_size", "received None", lambda: ann.NTXentLoss(0.5, None)),  # type: ignore[arg-type]
    ("memory", "received Tensor", lambda: ann.ContrastedMemoryLoss()(Z, Z, K)),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("argument", "part", "call"), CASES, ids=[f"{a}: {p}" for a, p, _ in CASES])
def test_a_wrong_argument_is_named(argument: str, part: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"`{argument}`: expected ")
    assert part in message
    assert "\n" not in message


def test_the_error_is_what_python_and_the_command_line_expect() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, UserError)


def test_an_implementation_that_cannot_run_says_why_and_names_those_that_can() -> None:
    with pytest.raises(ArgumentError, match="reference") as raised:
        AF.hopfield_retrieve(Q.double(), K.double(), impl="triton")
    assert raised.value.hint


ELSEWHERE: list[tuple[str, Callable[[], Any]]] = [
    ("prototypes", lambda: AF.hopfield_retrieve(Q, K.to("meta"))),
    ("values", lambda: AF.hopfield_retrieve(Q, K, values=K.to("meta"))),
    ("z_pair", lambda: AF.nt_xent(Z, Z.to("meta"))),
    ("columns", lambda: AF.info_nce(Z, Z.to("meta"), POSITIVE)),
    ("positive", lambda: AF.info_nce(Z, Z, POSITIVE.to("meta"))),
    ("exclude", lambda: AF.info_nce(Z, Z, POSITIVE, POSITIVE.to("meta"))),
    ("positions", lambda: AF.gather_positions(MAP, POSITIVE.to("meta"))),
    ("log_prior", lambda: AF.deviation_map(MAP, K, log_prior=torch.zeros(9, 5, device="meta"))),
    ("prototypes", lambda: AF.deviation_map(MAP, K.to("meta"))),
    ("bias", lambda: AF.read_memory(Q, K, bias=torch.zeros(5, device="meta"))),
    ("prototypes", lambda: AF.nearest(Q, K.to("meta"))),
    ("z_pair", lambda: AF.contrasted_memory_loss(Z, Z.to("meta"), K)),
    ("is_normal", lambda: AF.contrasted_memory_loss(Z, Z, K, is_normal=torch.ones(3, dtype=torch.bool, device="meta"))),
    ("is_normal", lambda: AF.margin_loss(Q[:, 0], torch.ones(3, dtype=torch.bool, device="meta"))),
]


@pytest.mark.parametrize(("argument", "call"), ELSEWHERE, ids=[f"{i}: {a}" for i, (a, _) in enumerate(ELSEWHERE)])
def test_a_tensor_on_another_device_is_named(argument: str, call: Callable[[], Any]) -> None:
    """A kernel would read whatever lies at its address."""
    with pytest.raises(ArgumentError, match="the device of") as raised:
        call()
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    "make",
    [
        lambda: ann.NTXentLoss(impl="cuda"),  # type: ignore[arg-type]
        lambda: ann.InfoNCELoss(impl="cuda"),  # type: ignore[arg-type]
        lambda: ann.VarianceHinge(impl="cuda"),  # type: ignore[arg-type]
        lambda: ann.ContrastedMemoryLoss(impl="cuda"),  # type: ignore[arg-type]
        lambda: ann.HopfieldMemory(4, 2, impl="cuda"),  # type: ignore[arg-type]
    ],
)
def test_a_layer_refuses_an_unknown_implementation_when_it_is_made(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError, match="`impl`: expected one of 'auto'"):
        make()
