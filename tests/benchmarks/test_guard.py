"""A guard against regressions without a clock: allocations and operator calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anomem import obstacles
from anomem.augment import AugmentConfig
from anomem.data import ResidentImages
from anomem.models import ModelConfig, build_model
from anomem.ops import contrast, retrieve
from anomem.train import OptimizerConfig, RunConfig, TrainConfig
from anomem.train.stage1 import train_stage1
from benchmarks.harness import measure
from benchmarks.harness.case import Case, case
from benchmarks.harness.measure import peak_bytes
from benchmarks.harness.prepare import Subject, input_sets
from benchmarks.operators import OPERATORS
from benchmarks.profile_training import random_images

MIB = 2**20

# Peak memory of the native library's training call (forward and backward, inputs not counted) as a share of eager's at
# the same size: what torch allocates, and that with the library's own memory in one thread. At these sizes
# [rows, columns] intermediates dominate eager.
SHARES = [
    (case("nt_xent", G=2, B=512, d=64), 1 / 12, 1 / 12),
    (case("info_nce", R=2048, C=2048, d=64), 1 / 12, 1 / 12),
    (case("retrieve", N=8192, M=512, d=32, B=128), 1 / 12, 1 / 10),
    (case("shrink", N=8192, M=512, d=32, B=128), 1 / 40, 1 / 30),
    (case("deviation_map", B=32, d=32, H=16, M=512, training=False), 1 / 200, 1 / 25),
    (case("usage", N=8192, M=512, d=32, training=False), 1 / 200, 1 / 40),
]


class Calls(TorchDispatchMode):
    """Counts operator calls below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*arguments, **(keywords or {}))


def peak(one: Case, impl: str) -> int:
    """Peak allocation of one call, warm."""
    subject = Subject(one, OPERATORS[one.operator].ours(impl), "cpu", input_sets(one, "cpu"))
    subject.call()
    return peak_bytes(subject.call, "cpu")


def native_or_skip(operator: str) -> None:
    """Skip where the native library cannot run an operator."""
    reason = obstacles.obstacle(operator, "native", "cpu", torch.float32, 64)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("one", "share", "with_scratch"), SHARES, ids=lambda value: getattr(value, "operator", ""))
def test_native_allocates_a_small_share_of_eager(
    one: Case, share: float, with_scratch: float, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what is kept for the backward pass, at most KEPT_BYTES."""
    native_or_skip(one.operator)
    for operators in (retrieve, contrast):
        monkeypatch.setattr(operators, "KEPT_BYTES", 0)
    eager = peak(one, "reference")
    assert peak(one, "native") <= with_scratch * eager
    monkeypatch.setattr(measure, "_scratch_peak", lambda: 0)
    assert peak(one, "native") <= share * eager


def test_native_nt_xent_grows_with_the_rows_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is kept for the backward pass, at most KEPT_BYTES."""
    native_or_skip("nt_xent")
    monkeypatch.setattr(contrast, "KEPT_BYTES", 0)
    small, large = (peak(case("nt_xent", G=1, B=batch, d=64), "native") for batch in (512, 2048))
    assert large < 5 * small  # 4 times the rows; 16 times the pairs


def step_calls(impl: str) -> Counter[str]:
    """Operator calls of one step of the training loop with three scales: the calls that a second step adds."""
    images = ResidentImages(random_images(16, 16))
    counts = []
    for steps in (1, 2):
        config = TrainConfig(
            augment=AugmentConfig.nothing(),
            model=ModelConfig(impl=impl),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(steps=steps, batch_size=8),
            run=RunConfig(device="cpu", precision="float32", memory_format="contiguous", log_every=10**9),
            prototypes_from="normal",
        )
        model = build_model(config.model, images.size, images.channels, (0.5,) * 3, (0.25,) * 3)
        with Calls() as calls:
            train_stage1(model, images, None, config, quiet=True)
        counts.append(calls.counts)
    return counts[1] - counts[0]


def test_one_native_call_for_each_operator_and_scale() -> None:
    for operator in ("retrieve", "nt_xent", "gather", "variance"):
        native_or_skip(operator)
    calls = step_calls("native")
    native = {name: count for name, count in calls.items() if name.startswith("anomem.")}
    for direction in ("fwd", "bwd"):  # with the weights kept where a scale has enough queries
        native[f"anomem.native_retrieve_{direction}"] += native.pop(f"anomem.native_retrieve_kept_{direction}")
    assert native == {
        f"anomem.native_{operator}_{direction}": 3
        for operator in ("retrieve", "nt_xent", "gather", "variance")
        for direction in ("fwd", "bwd")
    } | {"anomem.native_augment": 1}
    assert calls["aten.index_select"] == 1  # of the batch, no other
    assert not {"aten.logsumexp", "aten._softmax", "aten.native_layer_norm"} & calls.keys()


def test_fused_step_dispatches_fewer_operators_than_eager() -> None:
    for operator in ("retrieve", "nt_xent", "gather", "variance"):
        native_or_skip(operator)
    assert sum(step_calls("native").values()) < 0.7 * sum(step_calls("reference").values())
