"""Which implementation runs a call, and the words in which that is explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomem import backends, calibrate, choice, env, machine, obstacles, rules
from anomem.choice import Choice
from anomem.errors import ArgumentError
from anomem.machine import Measured
from anomem.rules import Problem, Rule, Where
from benchmarks.harness.rows import RESULTS, ROOT
from benchmarks.report import gains


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are not checked here; tests/choice is about that."""
    monkeypatch.setattr(choice, "distrust", lambda *_: None)


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "AUTO", ())
    monkeypatch.setattr(rules, "RULES", ())


def problem(operator: str = "nt_xent", dtype: torch.dtype = torch.float32, rows: int = 8) -> Problem:
    return Problem(operator, "cpu", dtype, 16, rows=rows, columns=8)


def test_the_reference_runs_everything() -> None:
    for operator in rules.OPERATORS:
        assert backends.choose(problem(operator), "reference") == "reference"


def test_auto_takes_the_first_rule_that_applies_and_can_run(monkeypatch: pytest.MonkeyPatch, no_rules: None) -> None:
    lines = (
        Rule("nt_xent", "cuda", "triton", Where(), "another device"),
        Rule("nt_xent", "cpu", "native", Where(rows=100), "measured"),
    )
    monkeypatch.setattr(rules, "AUTO", lines)
    monkeypatch.setattr(obstacles, "obstacle", lambda *args: None)
    assert backends.explain(problem(rows=100)) == ("native", "rows ≥ 100: measured")
    assert backends.explain(problem(rows=99))[0] == "reference"


def test_auto_passes_over_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "AUTO", (Rule("nt_xent", "cpu", "native", Where(), "fast"),))
    monkeypatch.setattr(obstacles, "obstacle", lambda *args: "not built")
    assert backends.explain(problem()) == ("reference", "native cannot run here: not built")
    with pytest.raises(ArgumentError, match="not built"):
        backends.choose(problem(), "native")


def test_a_rule_binds_to_the_processor_of_its_rows(monkeypatch: pytest.MonkeyPatch, no_rules: None) -> None:
    rule = Rule("nt_xent", "cpu", "native", Where(), "fast there", "AuthenticAMD family 26 AVX512-BF16")
    monkeypatch.setattr(rules, "AUTO", (rule,))
    monkeypatch.setattr(obstacles, "obstacle", lambda *args: None)
    monkeypatch.setattr(machine, "hardware", lambda device: "GenuineIntel family 6 AMX")
    assert backends.decide(problem())[:2] == ("reference", "default")
    monkeypatch.setattr(machine, "hardware", lambda device: rule.processor)
    assert backends.decide(problem())[:2] == ("reference", "default")  # a choice once made does not change
    backends._decided.clear()
    assert backends.decide(problem())[:2] == ("native", "table")


def test_every_rule_names_an_operator_an_implementation_and_its_reason() -> None:
    for rule in (*rules.AUTO, *rules.RULES):
        assert rule.operator in rules.OPERATORS
        assert rule.implementation in rules.IMPLEMENTATIONS[1:]
        assert rule.device in ("cpu", "cuda")
        assert str(rule.where)
        assert rule.reason


def test_a_condition_says_what_it_tests() -> None:
    where = Where(
        (torch.float32,), rows=2, columns=3, features=4, most_features=9, most_columns=2**13, most_work=2**35,
        scores_of_a_group=2**20, scores=2**33, all_rows=2, most_rows=2**20,
    )  # fmt: skip
    assert str(where) == (
        "float32, rows ≥ 2, columns ≥ 3, features ≥ 4, rows × columns ≥ 2^20, groups × rows × columns ≥ 2^33, "
        "groups × rows ≥ 2, features ≤ 9, columns ≤ 8192, rows ≤ 2^20, groups × rows × columns × features ≤ 2^35"
    )
    assert str(Where()) == "always"
    right = Problem("retrieve", "cpu", torch.float32, 4, rows=2**20, columns=2**13)
    assert where.holds(right)
    for change in (
        {"dtype": torch.float64}, {"features": 3}, {"features": 10}, {"rows": 1, "groups": 2**30}, {"columns": 2},
        {"rows": 2**6, "groups": 2**30}, {"rows": 2**19}, {"columns": 2**14}, {"rows": 2**21},
    ):  # fmt: skip
        assert not where.holds(right._replace(**change)), change
    assert Where().holds(right)


def test_every_rule_of_the_cpu_is_what_the_committed_rows_say() -> None:
    """Where a rule holds its implementation is faster than plain PyTorch in each case, and there is one in each dtype.

    The rows are those of the processor that the rule is bound to. The page lists the cases in which something else is
    faster, such as `torch.compile` or a formula of another library.
    """
    cases = gains.measured_cases(RESULTS)
    for rule in (rule for rule in rules.AUTO if rule.device == "cpu"):
        found = gains.covered(rule, cases)
        assert {case.problem.dtype for case in found} == set(rule.where.dtypes), rule
        for _, _, problem, times in found:
            assert min(times, key=times.__getitem__) == rule.implementation, (problem, times)


def test_the_gains_of_the_rules_are_those_of_the_committed_rows() -> None:
    assert gains.FILE.read_text(encoding="utf-8") == gains.render(RESULTS), "run python -m benchmarks.report"


def test_a_small_call_takes_what_committed_rows_show_faster_than_plain_pytorch() -> None:
    """The rules hold on processors without rows; no row of any processor contradicts them."""
    seen = set()
    for _, _, problem, times in gains.measured_cases(RESULTS):
        holding = [rule for rule in rules.RULES if rule.device == "cpu" and holds(rule, problem)]
        if holding and "native" in times and "eager" in times:
            seen.add(problem.operator)
            assert times["native"] < times["eager"], (problem, times)
    assert {"nt_xent", "info_nce", "variance"} <= seen


def holds(rule: Rule, problem: object) -> bool:
    assert isinstance(problem, Problem)
    return rule.operator == problem.operator and rule.where.holds(problem)


def test_a_choice_can_come_from_another_source(monkeypatch: pytest.MonkeyPatch, no_rules: None) -> None:
    """The first source that has an answer is taken; the ones behind it are asked where it has none."""

    def measured(problem: Problem) -> Choice | None:
        return Choice("native", "measured here", "1.3 times as fast") if problem.rows >= 100 else None

    monkeypatch.setattr(backends, "SOURCES", (measured, *backends.SOURCES))
    assert backends.decide(problem(rows=100)) == ("native", "measured here", "1.3 times as fast")
    assert backends.explain(problem(rows=100)) == ("native", "1.3 times as fast")
    assert backends.decide(problem(rows=99))[:2] == ("reference", "default")
    assert backends.choose(problem(rows=100), "auto") == "native"


def test_a_part_without_a_kernel_chooses_for_itself(monkeypatch: pytest.MonkeyPatch, no_rules: None) -> None:
    monkeypatch.setattr(obstacles, "obstacle", lambda operator, impl, *rest: None if impl == "reference" else "broken")
    assert backends.choose(problem("variance"), "triton", part=True) == "reference"
    with pytest.raises(ArgumentError, match="broken"):
        backends.choose(problem("variance"), "triton")
    for impl in ("triton", "native"):  # has a kernel, which cannot run here
        with pytest.raises(ArgumentError, match="broken"):
            backends.choose(problem("nt_xent"), impl, part=True)
    on_gpu = problem("usage")._replace(device="cuda")
    assert backends.choose(on_gpu, "native", part=True) == "reference"
    assert backends.choose(problem("nt_xent"), "reference", part=True) == "reference"
    with pytest.raises(ArgumentError, match="one of 'auto', 'reference', 'triton', 'native'"):
        backends.choose(problem(), "cuda", part=True)


def test_more_than_one_step_of_a_deviation_map_runs_the_reference() -> None:
    once = Problem("deviation_map", "cpu", torch.float32, 16, rows=8, columns=8)
    twice = once._replace(steps=2)
    assert backends.choose(twice, "auto") == "reference"
    with pytest.raises(ArgumentError, match="reads the memory once"):
        backends.choose(twice, "native")
    assert backends.choose(twice._replace(operator="retrieve"), "reference") == "reference"


def test_torch_still_knows_the_mark_of_a_constant_result() -> None:
    """It is set by hand, because the decorator imports the compiler."""

    @torch.compiler.assume_constant_result
    def decorated() -> None: ...

    assert vars(decorated) == {"_dynamo_marked_constant": True}
    marked = (
        obstacles._constant_obstacle, backends._hardware, choice._distrust, backends._constant_any_known,
        backends._constant_known,
    )  # fmt: skip
    assert all(vars(function) == vars(decorated) for function in marked)

    def untraceable(count: int) -> int:
        torch._dynamo.graph_break()
        return count

    def call(x: Tensor) -> Tensor:
        return x * untraceable(3)

    x = torch.ones(2)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, fullgraph=True, backend="eager")(x)
    untraceable._dynamo_marked_constant = True  # type: ignore[attr-defined]
    torch.compiler.reset()
    assert torch.compile(call, fullgraph=True, backend="eager")(x).tolist() == [3, 3]


def test_an_old_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "_capability", lambda: (7, 5))
    reason = obstacles.obstacle("retrieve", "native", "cuda", torch.float16, 64)
    assert reason == "the native CUDA kernels need compute capability 8.0 or later"


@pytest.mark.parametrize(
    ("operator", "dtype", "features", "rows", "taken"),
    [
        ("nt_xent", torch.bfloat16, 128, 8, "triton"),
        ("info_nce", torch.float16, 64, 8, "triton"),
        ("nt_xent", torch.float32, 128, 4096, "reference"),
        ("nt_xent", torch.bfloat16, 256, 4096, "reference"),
        ("retrieve", torch.bfloat16, 128, 2**19, "triton"),
        ("retrieve", torch.bfloat16, 128, 2**19 - 1, "reference"),
        ("gather", torch.float32, 512, 8, "native"),
        ("variance", torch.bfloat16, 512, 8, "native"),
        ("deviation_map", torch.bfloat16, 64, 2**20, "reference"),
        ("nt_xent", torch.float32, 1024, 2**30, "triton"),  # plain PyTorch does not fit
    ],
)
def test_on_a_gpu_the_kernels_are_taken_where_arithmetic_puts_them_ahead(
    monkeypatch: pytest.MonkeyPatch, operator: str, dtype: torch.dtype, features: int, rows: int, taken: str
) -> None:
    monkeypatch.setattr(obstacles, "obstacle", lambda *args: None)
    call = Problem(operator, "cuda", dtype, features, rows=rows, columns=8)
    assert backends.decide(call).implementation == taken
    assert backends.decide(call).reason


def test_obstacles_are_sentences() -> None:
    for operator, implementation, answer in obstacles.table("cpu"):
        assert answer == "runs" or len(answer.split()) > 3, (operator, implementation, answer)
    answers = {entry[:2]: entry[2] for entry in obstacles.table("cpu")}
    assert answers["deviation_map", "reference"] == "runs"
    assert answers["deviation_map", "native"] != "runs"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder with a choice and a check of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ANOMEM_CHOICE", "measure")
    monkeypatch.setenv("COLUMNS", "300")
    backends.forget()
    found = {"retrieve float32 1 x 128 x 8192 x 128 training": Measured("native", {"reference": 3.0, "native": 1.5})}
    checks = {"native usage float32 d 64": "passed", "native shrink float32 d 64": "error 3 expected 1"}
    machine.keep(choice.default_path(), "cpu", choices=found, checks=checks)
    return tmp_path


def test_the_environment_can_be_printed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    printed = capsys.readouterr().out
    for words in (
        "torch", "nt_xent", "triton", "native", "reference", "tiles of the Triton kernels", machine.hardware("cpu"),
        str(choice.default_path()), "2.00 times as fast as reference", "error 3 expected 1", "1 of 2 checks",
        "groups x rows x columns x features",
    ):  # fmt: skip
        assert words in printed, words


def test_the_environment_as_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main(["--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert torch.__version__.startswith(about["versions"]["torch"])
    cpu = about["devices"]["cpu"]
    assert cpu["hardware"] == machine.hardware("cpu")
    assert ["retrieve", "reference", "runs"] in cpu["runs"]
    (measured,) = (c for c in cpu["choices"] if c["source"] == "file")
    assert (measured["call"], measured["takes"]) == ("retrieve float32 1 x 128 x 8192 x 128 training", "native")
    assert measured["because"] == "2.00 times as fast as reference, 1.5 ms"
    assert {c["source"] for c in cpu["choices"]} <= {"table", "file", "rule", "default"}
    assert cpu["checks"]["native usage float32 d 64"] == "passed"


def test_the_environment_says_by_how_much_a_rule_of_the_table_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = next(rule for rule in rules.AUTO if rule.operator == "nt_xent")
    monkeypatch.setattr(machine, "hardware", lambda device: rule.processor)
    least, most, cases, threads = gains.table(RESULTS)[rule.key]
    because = {row["call"]: row["because"] for row in env.choices("cpu")}
    assert because[f"nt_xent, {rule.where}"] == (
        f"{least:.2f} to {most:.2f} times as fast as plain PyTorch at its fastest "
        f"({cases} cases of the committed rows, {threads} threads)"
    )


def test_the_environment_lists_no_measurement_that_the_table_goes_before(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "AUTO", ())
    assert "file" in {row["source"] for row in env.choices("cpu")}
    covering = rules.Rule(
        "retrieve", "cpu", "native", rules.Where((torch.float32,), rows=64), "rows", machine.hardware("cpu")
    )
    monkeypatch.setattr(rules, "AUTO", (covering,))
    assert [row["source"] for row in env.choices("cpu")][:1] == ["table"]
    assert "file" not in {row["source"] for row in env.choices("cpu")}


def test_the_environment_checks_and_measures(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr("anomem.calibrate.fill", lambda *arguments: ran.append(arguments[:3]))
    assert env.main(["--check", "--seconds", "7", "--json"]) == 0
    assert ran == [(device, choice.default_path(), 7.0) for device in calibrate.devices()]
    said = capsys.readouterr()
    assert json.loads(said.out)["devices"]  # nothing else on standard output
    assert f"kept in {choice.default_path()}" in said.err


def test_a_printed_choice_names_operators_of_one_reason_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"takes": "native", "source": "rule", "because": "benchmarks/results/" + 100 * "x"}
    rows = [{"call": call, **same} for call in ("retrieve, always", "usage, always", "usage, rows ≥ 8", "read, always")]
    assert [row["call"] for row in env._joined(rows)] == ["retrieve, usage, always", "usage, rows ≥ 8", "read, always"]
    monkeypatch.setattr(env, "choices", lambda device: rows)
    monkeypatch.setenv("COLUMNS", "80")
    assert env.main([]) == 0
    assert "…" not in capsys.readouterr().out  # a reason is broken, never cut


def test_the_environment_says_why_nothing_was_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ANOMEM_CHOICE", "measure")
    ours = Rule("usage", "cpu", "native", Where(), "measured", machine.hardware("cpu"))
    for table, words in (((), "--check does so"), ((ours,), "the committed rows are of")):
        monkeypatch.setattr(rules, "AUTO", table)
        backends.forget()
        assert env.main([]) == 0
        assert words in capsys.readouterr().out


def test_the_environment_as_a_command_whose_reader_leaves() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "anomem.env", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_source_of_tiles_is_told_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert obstacles.source_of_tiles() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(obstacles, "_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("ANOMEM_AUTOTUNE", "ANOMEM_TILES"):
        monkeypatch.delenv(name, raising=False)
    assert "the package's table" in obstacles.source_of_tiles()
    monkeypatch.setattr(obstacles, "_triton_obstacle", lambda *args: "not installed")
    assert obstacles.source_of_tiles() == "not installed"
