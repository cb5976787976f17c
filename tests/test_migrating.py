"""The page for those who come from another library: its snippets run, and what they assert holds."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_fitting import parts, write

PAGE = Path(__file__).resolve().parent.parent / "docs" / "MIGRATING.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PEERS = ("lightly", "pytorch_metric_learning", "hflayers", "anomalib")


def peer_of(snippet: str) -> str | None:
    """The other library that a snippet imports."""
    return next((name for name in PEERS if re.search(rf"^from {name}\b", snippet, re.MULTILINE)), None)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that snippets of the page share: what those without another library define."""
    shared: dict[str, Any] = {}
    for snippet in SNIPPETS:
        if peer_of(snippet) is None:
            exec(snippet, shared)
    return shared


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if peer_of(s)], ids=lambda s: f"{peer_of(s)}")
def test_a_snippet_holds(snippet: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peer_of(snippet)
    if peer is None or importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    if peer == "anomalib":
        photographs(tmp_path, monkeypatch)
    exec(snippet, dict(names))


def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that the snippets of anomalib read, and a PatchCore without weights, which would be downloaded."""
    from anomem import anomalib

    write(tmp_path / "photos" / "good", parts(24))
    write(tmp_path / "photos" / "bad", parts(4, 2, defect=True))
    monkeypatch.chdir(tmp_path)
    small = functools.partial(anomalib.Patchcore, backbone="resnet18", pre_trained=False)
    monkeypatch.setattr(anomalib, "Patchcore", small)


def test_a_cached_step_has_the_gradients_of_the_whole_batch(names: dict[str, Any]) -> None:
    encode, images, others = torch.nn.Linear(5, 4), *torch.randn(2, 23, 5)
    loss = names["cached_step"](encode, images, others, 0.3, block=7)
    cached = [parameter.grad for parameter in encode.parameters()]
    whole = names["ann"].NTXentLoss(0.3)(encode(images), encode(others))
    torch.testing.assert_close(loss, whole.double(), check_dtype=False, rtol=1e-6, atol=0)
    for mine, exact in zip(cached, torch.autograd.grad(whole, list(encode.parameters())), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-6)


def test_a_bank_is_cross_entropy_over_its_logits(names: dict[str, Any]) -> None:
    """lightly's memory bank from its definition, for where lightly is not installed."""
    z0, z1 = torch.randn(2, 8, 32)
    bank = torch.nn.functional.normalize(torch.randn(64, 32))
    unit = torch.nn.functional.normalize(z0)
    logits = torch.cat([torch.cosine_similarity(z0, z1)[:, None], unit @ bank.T], dim=1) / 0.5
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(names["bank_loss"](z0, z1, bank, 0.5), expected)


@pytest.mark.parametrize("batch", [8, 1024])
def test_a_bank_may_be_filled_before_the_backward_pass(names: dict[str, Any], batch: int) -> None:
    """At 1024 rows "auto" takes a kernel, which saves the bank it was given."""
    bank = torch.nn.functional.normalize(torch.randn(2048, 64))
    z0, z1 = torch.randn(2, batch, 64)
    gradients = []
    for fill_first in (False, True):
        leaf, rows = z0.clone().requires_grad_(), bank.clone()
        loss = names["bank_loss"](leaf, z1, rows, 0.5)
        if fill_first:
            rows[:batch] = torch.nn.functional.normalize(z1)
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_clip_is_two_cross_entropies(names: dict[str, Any]) -> None:
    image, text = torch.randn(2, 6, 16)
    scale = torch.tensor(14.0)
    a, b = (torch.nn.functional.normalize(x) for x in (image, text))
    logits, label = scale * a @ b.T, torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(x, label) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(names["clip_loss"](image, text, scale), expected)


def test_a_masked_pattern_is_not_read(names: dict[str, Any]) -> None:
    query, prototypes, values = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6, 3)
    keep = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    logits = (norm(query) @ norm(prototypes).T / 8**0.5).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(names["masked_retrieve"](query, prototypes, values, keep), logits.softmax(-1) @ values)
