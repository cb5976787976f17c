"""When a call is measured, what is measured, and which implementation wins."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import backends, choice, measuring, rules
from anomem import functional as AF
from anomem.machine import Measured
from anomem.ops import contrast
from anomem.rules import Problem
from tests.choice.large_call import LARGE, NAME, SMALL, content, kept, new_process


def test_a_small_call_follows_the_rule(timed: list[Problem]) -> None:
    assert backends.decide(SMALL)[:2] == ("reference", "default")
    assert timed == []


def test_no_size_lies_between_the_rule_for_small_calls_and_a_measurement() -> None:
    """A training step of 64 images has 2²³ multiplications a scale: it was contrasted in plain PyTorch."""
    assert choice._LARGE["cpu"] <= (rules._SMALL_CALL.most_work or 0)
    step = Problem("nt_xent", "cpu", torch.bfloat16, features=32, rows=128, columns=128, groups=16)
    assert rules._SMALL_CALL.holds(step) or choice.is_large(step)


def test_training_and_inference_are_chosen_apart(timed: list[Problem]) -> None:
    backends.decide(LARGE)
    with torch.no_grad():
        backends.decide(LARGE)
    assert timed == [LARGE, LARGE]
    inference = choice.bucket_of(LARGE._replace(operator="usage"), training=True)
    assert not inference.training


def test_deterministic_algorithms_mean_the_table(timed: list[Problem]) -> None:
    kept(choice.default_path())
    torch.use_deterministic_algorithms(True)
    assert backends.decide(LARGE)[:2] == ("reference", "default")
    torch.use_deterministic_algorithms(False)
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == []


def test_nothing_is_measured_while_a_mode_records_operators(timed: list[Problem]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        z = torch.ones(2, 256, 32)
        AF.nt_xent(z, z)
    assert backends.decide(LARGE)[:2] == ("reference", "default")  # as it was chosen there
    assert timed == []


def test_nothing_is_measured_or_decided_for_fake_tensors(timed: list[Problem]) -> None:
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        z = torch.empty(2, 256, 32)
        AF.nt_xent(z, z)
    assert AF.nt_xent(z, z).shape == ()  # outside of its mode
    assert timed == []
    assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert backends.decide(LARGE._replace(fake=True))[:2] == ("native", "measured")


def test_fake_tensors_are_seen_behind_others_and_behind_transforms(timed: list[Problem]) -> None:
    from torch._subclasses import FakeTensorMode

    real, fake = torch.ones(3, 4), FakeTensorMode().from_tensor(torch.ones(3, 4))
    told = []

    def tell(x: Tensor) -> Tensor:
        told.append(rules.problem_of("usage", real, x, features=4).fake)
        return x.sum()

    for x in (fake, real):
        tell(x)
        torch.func.grad(tell)(x)
        torch.func.vmap(torch.func.grad(tell))(x)
    assert told == [True] * 3 + [False] * 3
    assert not rules.problem_of("usage", real, None, features=4).fake


def test_a_choice_for_fake_tensors_of_symbolic_sizes(timed: list[Problem]) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    z = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(2, 256, 32))
    groups, rows, features = z.shape
    problem = rules.problem_of("nt_xent", z, features=features, rows=rows, columns=rows, groups=groups)
    assert backends.decide(problem)[:2] == ("reference", "default")
    found = AF.hopfield_retrieve(z[0], z[1])  # whose default beta is a number
    assert found.shape == (256, 32)
    assert timed == []


def test_nothing_is_measured_in_a_backward_pass(timed: list[Problem]) -> None:
    found = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: found.append(backends.decide(LARGE)))
    y.sum().backward()
    assert found[0][:2] == ("reference", "default")
    assert timed == []


def test_a_trace_takes_what_is_known_and_measures_nothing(timed: list[Problem]) -> None:
    taken: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        taken.append("native" if "autograd_function_apply" in graph.code or "native" in graph.code else "reference")
        return graph.forward

    def call(z: Tensor) -> Tensor:
        return AF.nt_xent(z, z + 1)

    z = torch.randn(2, 256, 32)
    torch.compile(call, fullgraph=True, backend=backend)(z)
    assert timed == []
    backends.decide(LARGE)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for batch in (256, 250, 200):  # one bucket
        compiled(torch.randn(2, batch, 32))
    assert taken == ["reference", "native"]
    torch.compiler.reset()
    torch.compile(call, fullgraph=True, backend=backend)(torch.randn(2, 150, 20))
    assert choice.known(choice.bucket_of(LARGE._replace(rows=300, columns=300, features=20), True)) == "native"
    assert taken[2:] == ["reference"]  # a small call
    torch.compiler.reset()


def fast(z: Tensor, z_pair: Tensor, *_: Any) -> Tensor:
    """In the place of an implementation: its result is not looked at."""
    return z.sum(-1) + z_pair.sum(-1)


def slow(z: Tensor, z_pair: Tensor, *_: Any) -> Tensor:
    time.sleep(0.02)
    return fast(z, z_pair)


@pytest.mark.usefixtures("checked")
def test_a_slow_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "nt_xent", slow)
    monkeypatch.setattr("anomem.reference.nt_xent_rows", fast)
    found = backends.decide(LARGE)
    assert found[:2] == ("reference", "measured")
    assert "times as fast as native" in found.reason
    assert backends.choose(LARGE, "native") == "native"  # named, it runs


@pytest.mark.usefixtures("checked")
def test_a_slow_reference_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "nt_xent", fast)
    monkeypatch.setattr("anomem.reference.nt_xent_rows", slow)
    assert backends.decide(LARGE)[:2] == ("native", "measured")


@pytest.mark.usefixtures("checked")
def test_a_kernel_that_fails_at_this_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("too many resources requested for launch")

    monkeypatch.setattr(contrast, "nt_xent", fails)
    assert backends.decide(LARGE)[:2] == ("reference", "measured")


def test_a_measurement_uses_the_threads_of_its_caller() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert choice.in_clean_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("operator", rules.OPERATORS)
@pytest.mark.parametrize("training", [True, False])
def test_every_operator_can_be_measured(operator: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    problem = Problem(
        operator, "cpu", torch.float32, 16, rows=64, columns=32 if operator != "nt_xent" else 64, groups=2
    )
    bucket = choice.bucket_of(problem, training)
    measured = measuring.measure(problem, bucket.training, ["native"], rivals=True)
    assert measured is not None
    expected = {"reference", "native", *(["SDPA"] if operator == "retrieve" else [])}
    assert set(measured.milliseconds) == expected
    assert measured.implementation != "SDPA"


@pytest.mark.parametrize("operator", rules.OPERATORS)
def test_what_is_measured_is_bounded(operator: str) -> None:
    problem = Problem(operator, "cpu", torch.float32, 256, rows=2**20, columns=2**20, groups=2**10)
    small = measuring.bounded(problem)
    elements = sum(int(torch.tensor(shape).prod()) for shape in shapes_of(small))
    assert elements <= 2**26
    assert rules.work(small) <= 2**30
    if operator == "nt_xent":
        assert small.rows == small.columns
        assert small.rows % 2 == 0
    assert measuring.bounded(small) == small
    assert measuring.bounded(SMALL._replace(operator=operator)) == SMALL._replace(operator=operator)


def test_a_retrieval_is_measured_on_many_queries() -> None:
    """Of 256 queries of such a call the sums of the memory's gradient take a large part, and the reference won."""
    small = measuring.bounded(Problem("retrieve", "cpu", torch.float32, 256, rows=8192, columns=2048))
    assert (small.rows, small.columns) == (1024, 512)


def test_a_convolution_is_measured_on_several_images() -> None:
    """Of one image most of the time is the weight's, whichever kernel is faster for a batch."""
    problem = Problem("conv3x3", "cpu", torch.float32, 512, rows=16, columns=512, groups=64)
    small = measuring.bounded(problem)
    assert small.groups >= 8
    assert small._replace(groups=64) == problem


def shapes_of(problem: Problem) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [
            (problem.groups, problem.rows, problem.features) if problem.operator != "gather" else
            (problem.rows, problem.features, problem.columns)
        ]  # fmt: skip


def test_a_measurement_sees_nothing_of_its_caller(monkeypatch: pytest.MonkeyPatch, checked: None) -> None:
    """Autocast, torch.func and hooks on saved tensors are the caller's own."""
    seen = []

    def measure(problem: Problem, training: bool, kernels: list[str], rivals: bool = False) -> Measured:
        x = torch.ones(2, 2, requires_grad=True)
        seen.append((x @ x).dtype)
        torch.autograd.grad((x @ x).sum(), x)
        return Measured("native", {"reference": 2.0, "native": 1.0})

    monkeypatch.setattr(measuring, "measure", measure)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("packed"), lambda _: pytest.fail("unpacked"))
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert seen == [torch.float32]


MAP = Problem("deviation_map", "cpu", torch.float32, 64, rows=4096, columns=256)


def test_a_call_that_the_chosen_kernel_cannot_run_takes_the_reference(timed: list[Problem]) -> None:
    """A bucket says nothing of reads or of forward mode: two reads were given one, without a word."""
    assert backends.decide(MAP)[:2] == ("native", "measured")
    assert backends.decide(MAP._replace(steps=2)).implementation == "reference"
    backends.decide(LARGE)
    with torch.autograd.forward_ad.dual_level():
        assert backends.decide(LARGE).implementation == "reference"
    assert timed == [MAP, LARGE]


def test_such_a_call_decides_nothing_for_the_others_of_its_bucket(timed: list[Problem]) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert backends.decide(LARGE).implementation == "reference"
    assert backends.decide(MAP._replace(steps=2)).implementation == "reference"
    assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert backends.decide(MAP)[:2] == ("native", "measured")


def test_a_small_call_decides_nothing_for_the_large_ones_of_its_bucket(timed: list[Problem]) -> None:
    large = LARGE._replace(rows=512, columns=512, groups=1)
    small = large._replace(rows=300, columns=300)
    assert choice.bucket_of(small, True) == choice.bucket_of(large, True)
    assert not choice.is_large(small)
    assert backends.decide(small).source == "default"
    assert backends.decide(large)[:2] == ("native", "measured")
    assert backends.decide(small._replace(rows=301, columns=301)).source == "default"


@pytest.mark.parametrize("first", [MAP, MAP._replace(steps=2)])
def test_a_traced_call_of_two_reads_takes_the_reference(first: Problem) -> None:
    feature_map, memory = torch.randn(4, 64, 32, 32), torch.randn(256, 64)
    backends.decide(first)

    def call(feature_map: Tensor) -> Tensor:
        return AF.deviation_map(feature_map, memory, steps=2)

    expected = AF.deviation_map(feature_map, memory, steps=2, impl="reference")
    torch.testing.assert_close(call(feature_map), expected)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(feature_map), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_fork_chooses_while_a_thread_of_its_parent_measures(
    monkeypatch: pytest.MonkeyPatch, checked: None
) -> None:
    measuring_now, forked = threading.Event(), threading.Event()

    def measure(*_: Any) -> Measured:
        measuring_now.set()
        forked.wait(30)
        return Measured("native", {"reference": 2.0, "native": 1.0})

    monkeypatch.setattr(measuring, "measure", measure)
    thread = threading.Thread(target=backends.decide, args=(LARGE,))
    thread.start()
    assert measuring_now.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        known = choice.known(choice.bucket_of(LARGE._replace(features=64), True))
        os._exit(known is not None)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_run_goes_on_with_the_choices_it_began_with(timed: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that has not settled is not in the file, and other kernels give other bits."""
    backends.decide(LARGE)
    before = json.loads(json.dumps(choice.choices_made("cpu")))
    assert before["choices"] == {NAME: "native"}
    for software, source in (("other software", "measured"), (before["software"], "run")):
        choice.default_path().unlink()
        new_process()
        choice.follow({**before, "software": software})
        followed = choice.any_known("nt_xent", "cpu", torch.float32)  # by a trace as well
        assert followed == (source == "run")
        assert backends.decide(LARGE)[:2] == ("native", source)
    assert timed == [LARGE, LARGE]
    kept(choice.default_path(), "reference")
    new_process()
    backends.decide(LARGE)
    choice.follow(before)
    backends._decided.clear()
    assert backends.decide(LARGE)[:2] == ("reference", "file")  # made already


def test_threads_choose_once(timed: list[Problem]) -> None:
    threads = [threading.Thread(target=backends.decide, args=(LARGE,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timed == [LARGE]


def test_times_that_overlap_are_not_kept(monkeypatch: pytest.MonkeyPatch, checked: None) -> None:
    """The choice holds in this process; the next one measures again."""
    assert not measuring._separate({"reference": [3.0, 2.0, 1.0], "native": [2.5, 2.0, 1.5]})
    assert not measuring._separate({"reference": [3.0, 3.0], "native": [1.0, 1.0]})
    assert not measuring._separate({"reference": [0.5, 4.0, 4.0, 4.0, 4.0], "native": [1.0, 1.0, 1.0, 1.0, 1.0]})
    assert measuring._separate({"reference": [3.0, 4.0, 5.0], "native": [1.0, 2.0, 2.5], "SDPA": [1.0, 2.0, 2.5]})
    monkeypatch.setattr(measuring, "_separate", lambda seconds, tie=0.0: False)
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    assert backends.decide(LARGE).source == "measured"
    assert content(choice.default_path())["sections"][0]["choices"] == {}


@pytest.mark.parametrize(
    ("third", "settled"), [([1.0, 1.05, 1.1], True), ([9.0, 9.0, 9.0], True), ([1.0, 1.2, 9.0], False)]
)
def test_equal_times_are_kept(
    third: list[float], settled: bool, monkeypatch: pytest.MonkeyPatch, timed: list[Problem], checked: None
) -> None:
    """Measuring again would gain nothing; what a disturbance may have decided is measured again."""
    times = {"reference": [1.0, 1.1, 1.2], "native": [1.0, 1.05, 1.3], "triton": third}
    assert not measuring._separate(times)
    assert measuring._separate(times, measuring._TIE) == settled
    measured = Measured("reference", {"reference": 1.1, "native": 1.05}, settled)
    monkeypatch.setattr(measuring, "measure", lambda *_: measured)
    assert backends.decide(LARGE).source == "measured"
    assert bool(content(choice.default_path())["sections"][0]["choices"]) == settled


def test_a_measurement_ends() -> None:
    def done(rounds: int, seconds: float, passed: float) -> bool:
        times = {"reference": [2 * seconds] * rounds, "native": [seconds] * rounds}
        return measuring._done(times, passed)

    assert not done(14, 1e-3, 0.0)  # short calls take more rounds
    assert done(15, 1e-3, 0.0)
    assert not done(2, 0.1, 0.4)
    assert done(3, 0.1, 0.6)
    assert done(1, 5.0, 10.0)  # a busy machine
    assert not measuring._done({"reference": [], "native": []}, 10.0)
    overlapping = {"reference": [0.1, 0.2, 0.3], "native": [0.1, 0.2, 0.3]}
    assert not measuring._done(overlapping, 0.2)
    assert measuring._done(overlapping, 0.3)


def test_how_far_ahead_is_told() -> None:
    told = str(Measured("native", {"reference": 3.0, "native": 1.5, "SDPA": 2.25}))
    assert told == "2.00 times as fast as reference, 1.50 times as fast as SDPA, 1.5 ms"
    assert str(Measured("reference", {"reference": 2.0, "native": 1.96})) == "as fast as native within 2%, 2 ms"
