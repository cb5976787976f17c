"""The harness: it rejects wrong numbers, goes on after failures, and keeps rows from which a run is resumed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import tyro

from benchmarks.harness import rows
from benchmarks.harness.base import Base
from benchmarks.harness.case import Implementation, case
from benchmarks.harness.console import Bar, table
from benchmarks.harness.measure import Timed, TookTooLong, is_out_of_memory, peak_bytes, take_turns, time_limit
from benchmarks.harness.prepare import Bench, Bounds
from benchmarks.harness.rows import NoTime, Others, Unavailable
from benchmarks.harness.runner import Runner
from benchmarks.operators import OPERATORS
from benchmarks.rivals import implementations
from benchmarks.run import Options, _plain, main
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
    assert ready.once() > 0
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

    monkeypatch.setattr("benchmarks.harness.prepare.warm_up_compiler", lambda device: None)
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

    monkeypatch.setattr("benchmarks.harness.prepare.warm_up_compiler", lambda device: None)
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
    monkeypatch.setattr("benchmarks.harness.runner.implementations", lambda operator: [slow])
    monkeypatch.setattr("benchmarks.harness.prepare.Subject.once", lambda self: 0.025)
    cases = tuple(case("retrieve", N=N, M=16, d=d, B=8) for N, d in ((128, 16), (128, 32), (512, 16)))
    runner = Runner(Suite("test", cases, seconds=0.001), "cpu", Bounds(seconds=0.02, bytes=2**30), None, set())
    monkeypatch.setattr(runner.ceilings, "product", lambda dtype: 1e11)
    monkeypatch.setattr(runner.ceilings, "copy", lambda: 1e10)
    found = [row for one in cases for row in runner.run(one)]
    assert [row.status for row in found] == [rows.OVER_TIME] * 3
    assert started == list(cases[:2])  # the third stores four times as much
    assert "an earlier case's rate makes it 0.1 s" in found[2].reason


def test_calls_take_turns_until_each_has_enough() -> None:
    order = []

    def call(name: str, seconds: float) -> Timed:
        return Timed(once=lambda: order.append(name) or seconds)

    quick, slow = call("quick", 0.1), call("slow", 0.5)
    take_turns([quick, slow], lambda one: sum(one.seconds) > 0.4, most=3)
    assert order == ["quick", "slow", "quick", "quick"]
    assert quick.seconds == [0.1] * 3  # most
    assert slow.milliseconds() == {"p20": 500.0, "p50": 500.0, "p80": 500.0}


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


LINES = [
    ([], Options()),
    (
        ["--suite", "smoke", "--device", "cpu", "--filter", "nt_xent G=4", "--json", "rows.jsonl"],
        Options(suite="smoke", device="cpu", filter="nt_xent G=4", json="rows.jsonl"),
    ),
    (
        ["--no-resume", "--base", "HEAD~1", "--seconds", "2.5", "--memory", "3"],
        Options(resume=False, base="HEAD~1", seconds=2.5, memory=3.0),
    ),
]


@pytest.mark.parametrize(("line", "options"), LINES, ids=lambda value: str(len(value)) if type(value) is list else "")
def test_options_are_read(line, options, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *line])
    assert tyro.cli(Options) == options


@pytest.mark.parametrize("line", [["--suit", "kernels"], ["--suite", "unknown"], ["--seconds", "soon"]])
def test_wrong_options_end_the_program(line, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *line])
    with pytest.raises(SystemExit) as ended:
        tyro.cli(Options)
    assert ended.value.code == 2
    capsys.readouterr()


def test_tables_and_progress_are_plain_in_a_file(capsys) -> None:
    table("title", ("name", "ms"), [("eager", "1.5"), ("native", "10")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "title"]
    assert [line.strip("│ ").split() for line in lines[5:7]] == [["eager", "│", "1.5"], ["native", "│", "10"]]
    with Bar(1) as bar:
        bar.note("eager")
        bar.step()
    assert "1/1" in capsys.readouterr().out


def test_a_base_revision_is_measured_in_its_own_process(monkeypatch) -> None:
    if not rows.git("rev-parse", "HEAD"):
        pytest.skip("no git repository: there is no other revision")
    monkeypatch.setattr(Base, "_native_library", lambda self: None)  # eager needs none
    eager, *_ = implementations("retrieve")
    with Base("HEAD", "cpu") as base:
        ready = base.ready(SMALL, eager, BOUNDS)
        assert ready.once() > 0
        assert ready.checked == SMALL.dims
        with pytest.raises(NoTime) as caught:
            base.ready(case("retrieve", N=2**24, M=8192, d=16, B=8), eager, BOUNDS)
    assert caught.value.status == rows.OUT_OF_MEMORY
    with pytest.raises(ValueError, match="no-such-revision"):
        Base("no-such-revision", "cpu")


def test_a_title_of_the_report_is_a_filter() -> None:
    chosen = [
        c.title for c in suite("kernels", "cpu").cases if _plain("`nt_xent` G 16, B 512, d 128") in _plain(c.title)
    ]
    assert chosen == ["nt_xent G=16 B=512 d=128 float32 forward+backward large"]


def test_an_implementation_that_no_case_has_is_named(capsys) -> None:
    assert main(Options(suite="smoke", device="cpu", filter="nt_xent", only=("nativ", "eager"))) == 2
    said = capsys.readouterr()
    assert "--only: expected some of" in said.out + said.err
    assert "received nativ" in said.out + said.err
