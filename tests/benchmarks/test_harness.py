"""The harness: it refuses wrong numbers, survives what cannot run, and keeps rows that can be taken up again."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch
from benchmarks.case import Implementation, Unavailable, case
from benchmarks.compiling import TookTooLong, time_limit
from benchmarks.machine import Others
from benchmarks.memory import is_out_of_memory, peak_bytes
from benchmarks.prepare import Bench, Bounds, NoTime
from benchmarks.runner import Runner

from benchmarks import rows
from benchmarks.operators import OPERATORS
from benchmarks.suites import SUITES, Suite, suite

SMALL = case("retrieve", N=128, M=16, d=16, B=8)
BOUNDS = Bounds(seconds=60.0, bytes=2**30)


def made(build, **fields) -> Implementation:
    return Implementation("made for the test", "retrieve", build, **fields)


def no_time(implementation, one=SMALL, bounds=BOUNDS) -> NoTime:
    with pytest.raises(NoTime) as caught:
        Bench(one, "cpu", bounds).ready(implementation)
    return caught.value


def wrong_temperature(case, device):
    from anomem.functional import hopfield_retrieve

    return lambda query, prototypes: hopfield_retrieve(query, prototypes, beta=0.3)


def wrong_gradient(case, device):
    def retrieve(query, prototypes):
        return OPERATORS["retrieve"].ours("reference")(query, prototypes.detach()) + 0 * prototypes.sum()

    return retrieve


@pytest.mark.parametrize("build", [wrong_temperature, wrong_gradient])
@pytest.mark.parametrize("ours", [True, False])
def test_wrong_numbers_get_no_time(build, ours) -> None:
    assert no_time(made(build, ours=ours)).status == rows.WRONG


def test_right_numbers_get_a_time() -> None:
    ready = Bench(SMALL, "cpu", BOUNDS).ready(made(lambda case, device: OPERATORS["retrieve"].ours("reference")))
    assert ready.subject.once() > 0
    assert ready.peak_bytes > 128 * 16 * 4  # at least the weights
    assert ready.checked == SMALL.dims


def test_reasons_are_kept() -> None:
    def missing(case, device):
        raise Unavailable("package so-and-so is not installed")

    def broken(case, device):
        raise TypeError("unexpected")

    def too_large(case, device):
        return lambda query, prototypes: torch.empty(2**60)

    assert no_time(made(missing)).reason == "package so-and-so is not installed"
    assert no_time(made(broken)).status == rows.FAILED
    assert no_time(made(too_large)).status == rows.OUT_OF_MEMORY


def test_what_cannot_fit_is_not_started() -> None:
    def never(case, device):
        raise AssertionError("was started")

    found = no_time(made(never, stored=4), case("retrieve", N=2**24, M=8192, d=16, B=8))
    assert found.status == rows.OUT_OF_MEMORY
    assert "GiB" in found.reason


def test_failed_allocation_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_peak_is_exact_and_a_difference() -> None:
    held = torch.zeros(2**20)

    def call():
        first = torch.empty(2**18)
        second = torch.empty(2**19)
        del first
        return torch.empty(2**17), second

    assert peak_bytes(call, "cpu") == 4 * (2**18 + 2**19)
    del held


def test_limit_interrupts_a_child_process() -> None:
    begun = time.perf_counter()
    with pytest.raises(TookTooLong), time_limit(0.2):
        subprocess.run(["sleep", "30"])
    assert time.perf_counter() - begun < 10


def test_compiler_that_does_not_end_makes_a_row(monkeypatch) -> None:
    def never_ends(case, device):
        def retrieve(query, prototypes):
            try:
                time.sleep(30)
            except Exception:  # as a compiler does that falls back to something else
                time.sleep(30)

        return retrieve

    monkeypatch.setattr("benchmarks.prepare.warm_up", lambda device: None)
    found = no_time(made(never_ends, compiles=True), bounds=Bounds(seconds=60.0, bytes=2**30, preparation=0.2))
    assert (found.status, found.reason) == (rows.OVER_TIME, "compiling took longer than 0.2 s")


def test_time_to_compile_is_apart_from_the_time_of_a_call(monkeypatch) -> None:
    def compiles_for_a_while(case, device):
        reference, compiled = OPERATORS["retrieve"].ours("reference"), []

        def retrieve(query, prototypes):
            if not compiled:
                time.sleep(0.3)
                compiled.append(True)
            return reference(query, prototypes)

        return retrieve

    monkeypatch.setattr("benchmarks.prepare.warm_up", lambda device: None)
    ready = Bench(SMALL, "cpu", BOUNDS).ready(made(compiles_for_a_while, compiles=True))
    assert ready.compile_seconds is not None
    assert ready.compile_seconds > 0.25 > ready.warm_seconds


def test_runner_makes_rows_and_skips_known_ones(tmp_path, monkeypatch) -> None:
    small = Suite("test", (SMALL,), seconds=0.001, least_repeats=2, most_repeats=3, compiled_groups=())
    runner = Runner(small, "cpu", BOUNDS, None, set())
    monkeypatch.setattr(runner.ceilings, "product", lambda dtype: 1e11)
    monkeypatch.setattr(runner.ceilings, "copy", lambda: 1e10)
    path = tmp_path / "rows.jsonl"
    for row in runner.run(SMALL):
        rows.append(path, row)
    found = rows.read(path)
    eager = next(row for row in found if row.implementation == "eager")
    assert eager.status == rows.MEASURED
    assert eager.milliseconds["p20"] <= eager.milliseconds["p50"] <= eager.milliseconds["p80"]
    assert eager.fraction_of_floor == pytest.approx(eager.floor_milliseconds / eager.milliseconds["p50"])
    assert {"commit", "dirty", "torch", "triton", "cuda", "device_name", "threads"} <= set(eager.about)
    compiled = next(row for row in found if row.implementation == "torch.compile")
    assert compiled.status == rows.UNAVAILABLE
    again = Runner(small, "cpu", BOUNDS, None, {row.key for row in found})
    monkeypatch.setattr(again.ceilings, "product", lambda dtype: 1e11)
    monkeypatch.setattr(again.ceilings, "copy", lambda: 1e10)
    assert list(again.run(SMALL)) == []


def test_time_is_foreseen_from_what_an_implementation_stores(monkeypatch) -> None:
    started = []

    def build(one, device):
        started.append(one)
        return OPERATORS["retrieve"].ours("reference")

    slow = made(build, stored=1, elements=lambda dims: dims["N"])
    monkeypatch.setattr("benchmarks.runner.implementations", lambda operator: [slow])
    monkeypatch.setattr("benchmarks.timing.Subject.once", lambda self: 0.025)
    cases = tuple(case("retrieve", N=N, M=16, d=d, B=8) for N, d in ((128, 16), (128, 32), (512, 16)))
    runner = Runner(Suite("test", cases, seconds=0.001), "cpu", Bounds(seconds=0.02, bytes=2**30), None, set())
    monkeypatch.setattr(runner.ceilings, "product", lambda dtype: 1e11)
    monkeypatch.setattr(runner.ceilings, "copy", lambda: 1e10)
    found = [row for one in cases for row in runner.run(one)]
    assert [row.status for row in found] == [rows.OVER_TIME] * 3
    assert started == list(cases[:2])  # the third stores four times as much
    assert "an earlier case's rate makes it 0.1 s" in found[2].reason


def test_cores_of_others_are_what_this_process_did_not_use(monkeypatch) -> None:
    readings = iter([(10.0, 100.0, 5.0), (12.0, 103.0, 6.0)])  # wall, all cores, this process
    monkeypatch.setattr(Others, "_seconds", lambda self: next(readings))
    with Others() as others:
        pass
    assert others.cores == 1.0  # 2 s of the 3 that cores were busy, in 2 s


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_cases_of_a_suite_differ_and_can_be_filtered_by_title(name, device) -> None:
    titles = [one.title for one in suite(name, device).cases]
    assert len(titles) == len(set(titles))


def test_every_operator_is_in_the_smoke_suite() -> None:
    assert {one.operator for one in suite("smoke", "cpu").cases} == set(OPERATORS)
