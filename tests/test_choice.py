"""The choice that this machine makes: files of it and of others, measurements, checks of kernels, when none runs."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import backends, calibrate, choice, env, rules
from anomem import functional as AF
from anomem.backends import Choice
from anomem.choice import Measured
from anomem.ops import contrast, native
from anomem.rules import Problem

LARGE = Problem("nt_xent", "cpu", torch.float32, 32, rows=512, columns=512, groups=2)
SMALL = LARGE._replace(rows=16, columns=16)
NAME = "nt_xent float32 2 x 512 x 512 x 32 training"

pytestmark = pytest.mark.skipif(native.obstacle("cpu") is not None, reason=str(native.obstacle("cpu")))


@pytest.fixture(autouse=True)
def measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user's process with a cache folder of its own, on a processor without committed rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ANOMEM_CHOICE")
    monkeypatch.setattr(rules, "AUTO", ())
    monkeypatch.setattr(rules, "RULES", ())
    torch.use_deterministic_algorithms(False)
    backends.forget()
    yield
    monkeypatch.undo()
    backends.forget()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel passes its check."""
    monkeypatch.setattr(calibrate, "check", lambda *_: "passed")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, checked: None) -> list[Problem]:
    """Measurements find the kernel twice as fast; gives the calls that were measured."""
    calls: list[Problem] = []

    def measure(problem: Problem, training: bool, kernels: list[str], rivals: bool = False) -> Measured:
        calls.append(problem)
        return Measured("native", {"reference": 2.0, "native": 1.0})

    monkeypatch.setattr(calibrate, "measure", measure)
    return calls


def content(path: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(path.read_text())
    return text


def kept(place: Path, implementation: str = "native", **section: str) -> None:
    """A file with one choice, of this machine unless the section says otherwise."""
    hardware, software = choice.identity("cpu")
    choices = {NAME: {"implementation": implementation, "milliseconds": {"reference": 3.0, "native": 1.5}}}
    one = {"hardware": hardware, "software": software, "choices": choices, "checks": {}, **section}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"format": choice.FORMAT, "sections": [one]}))


def new_process() -> None:
    backends.forget()


def test_a_large_call_is_measured_once_and_kept(timed: list[Problem]) -> None:
    found = backends.decide(LARGE)
    assert found == Choice("native", "measured", "2.00 times as fast as reference, 1 ms")
    assert backends.decide(LARGE._replace(rows=510, columns=510)) == found  # the same bucket
    assert timed == [LARGE]
    (section,) = content(choice.default_path())["sections"]
    assert (section["hardware"], section["software"]) == choice.identity("cpu")
    assert section["choices"] == {NAME: {"implementation": "native", "milliseconds": {"reference": 2.0, "native": 1.0}}}
    assert section["checks"] == {"native nt_xent float32 d 32": "passed"}
    new_process()
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == [LARGE]


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


def test_a_choice_does_not_change_within_a_process(timed: list[Problem]) -> None:
    before = backends.decide(LARGE)
    kept(choice.default_path(), "reference")
    assert backends.decide(LARGE) == before
    backends._decided.clear()
    assert backends.decide(LARGE) == before
    new_process()
    assert backends.decide(LARGE)[:2] == ("reference", "file")


@pytest.mark.parametrize("field", ["hardware", "software"])
def test_the_file_of_another_machine_is_not_used_and_stays(timed: list[Problem], field: str) -> None:
    kept(choice.default_path(), "reference", **{field: "another one"})
    assert backends.decide(LARGE)[:2] == ("native", "measured")
    sections = content(choice.default_path())["sections"]
    # The same hardware with other software is replaced.
    assert [s[field] for s in sections] == (
        ["another one", choice.identity("cpu")[0]] if field == "hardware" else [choice.identity("cpu")[1]]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"implementation": "native"', '"implementation": "fast"'),
        lambda text: text.replace("1.5", '"fast"'),
        lambda text: "[]",
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_reported_and_not_overwritten(timed: list[Problem], damage: Callable[[str], str]) -> None:
    kept(choice.default_path())
    damaged = damage(choice.default_path().read_text())
    choice.default_path().write_text(damaged)
    with pytest.warns(RuntimeWarning, match="is not a file of choices"):
        assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert choice.default_path().read_text() == damaged


def test_a_folder_that_cannot_be_written_is_a_warning(
    timed: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="not kept: cannot write"):
        assert backends.decide(LARGE).implementation == "native"


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "ANOMEM_CHOICE"])
def test_a_folder_that_cannot_be_looked_into_is_a_warning(
    timed: list[Problem], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A name too long for the system fails as a folder that is closed to the user does, also for root."""
    monkeypatch.setenv(name, f"/tmp/{'x' * 300}")
    new_process()
    with pytest.warns(RuntimeWarning, match="no choices of this machine are used"):
        backends.decide(LARGE)


def test_a_user_without_a_home(timed: list[Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert backends.decide(LARGE).source == "measured"
    assert choice.default_path() == tmp_path / "anomem" / "choices.json"
    assert choice.default_path().exists()
    monkeypatch.setenv("ANOMEM_CHOICE", "~nobody/choices.json")
    new_process()
    with pytest.warns(RuntimeWarning, match="no choices of this machine are used"):
        assert backends.decide(LARGE).source == "default"


def test_the_environment_asks_for_the_table(timed: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(choice.default_path())
    monkeypatch.setenv("ANOMEM_CHOICE", "table")
    new_process()
    assert backends.decide(LARGE)[:2] == ("reference", "default")
    assert timed == []


def test_the_environment_names_a_file(timed: list[Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "mine" / "choices.json"
    kept(named)
    before = named.read_text()
    monkeypatch.setenv("ANOMEM_CHOICE", str(named))
    new_process()
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert backends.decide(LARGE._replace(features=64))[:2] == ("reference", "default")
    assert timed == []
    assert named.read_text() == before
    assert not choice.default_path().exists()
    named.unlink()
    new_process()
    with pytest.warns(RuntimeWarning, match="No such file"):
        assert backends.decide(LARGE)[:2] == ("reference", "default")


def test_deterministic_algorithms_mean_the_table(timed: list[Problem]) -> None:
    kept(choice.default_path())
    torch.use_deterministic_algorithms(True)
    assert backends.decide(LARGE)[:2] == ("reference", "default")
    torch.use_deterministic_algorithms(False)
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == []


def test_ranks_of_a_job_follow_no_file_but_a_named_one(timed: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(choice.default_path())
    monkeypatch.setattr(choice, "_is_a_job", lambda: True)
    assert backends.decide(LARGE)[:2] == ("reference", "default")
    monkeypatch.setenv("ANOMEM_CHOICE", str(choice.default_path()))
    new_process()
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == []


def test_nothing_is_measured_while_a_mode_records_operators(timed: list[Problem]) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        z = torch.empty(2, 256, 32)
        AF.nt_xent(z, z)
    assert backends.decide(LARGE)[:2] == ("reference", "default")  # as it was chosen there
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


def test_no_memory_for_a_check_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> str:
        raise torch.OutOfMemoryError

    check = calibrate.check
    monkeypatch.setattr(calibrate, "check", fails)
    assert "no memory" in str(choice.distrust("nt_xent", "native", "cpu", torch.float32, 32))
    monkeypatch.setattr(calibrate, "check", check)
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


def test_a_measurement_uses_the_threads_of_its_caller() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert choice.in_clean_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def wrong_by_little(right: Tensor) -> Tensor:
    return right * 1.001


def wrong_in_a_row(right: Tensor) -> Tensor:
    return torch.where(torch.arange(right.shape[-1]) == right.shape[-1] - 1, right + 0.5, right)


def wrong_in_the_gradient(right: Tensor) -> Tensor:
    return right.detach() + 1.01 * (right - right.detach())


def not_a_number(right: Tensor) -> Tensor:
    return right * torch.nan


def of_another_shape(right: Tensor) -> Tensor:
    return right[..., :-1]


def does_not_compile(right: Tensor) -> Tensor:
    raise NotImplementedError("ptxas: no such\n  instruction")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (wrong_by_little, "error 0.001 of the largest magnitude"),
        (wrong_in_a_row, "of the largest magnitude"),
        (wrong_in_the_gradient, "error 0.01 of the largest magnitude"),
        (not_a_number, "error nan"),
        (of_another_shape, "shape"),
        (does_not_compile, "NotImplementedError: ptxas: no such instruction"),
    ],
)
def test_a_wrong_kernel_is_switched_off_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor], words: str, recwarn: pytest.WarningsRecorder
) -> None:
    right, runs = contrast.nt_xent, []

    def planted(*arguments: Any) -> Tensor:
        runs.append(arguments)
        return fault(right(*arguments))

    monkeypatch.setattr(contrast, "nt_xent", planted)
    z = torch.randn(2, 256, 32)
    expected = AF.nt_xent(z, z + 1, impl="reference")
    for _ in range(2):
        assert torch.equal(AF.nt_xent(z, z + 1), expected)
    assert backends.decide(LARGE._replace(rows=1024, columns=1024)).implementation == "reference"
    assert len(runs) == 1  # the check
    (warning,) = [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert "native nt_xent float32 d 32 is switched off" in str(warning.message)
    assert words in str(warning.message)
    checks = content(choice.default_path())["sections"][0]["checks"]
    assert words in checks["native nt_xent float32 d 32"]
    new_process()
    with pytest.warns(RuntimeWarning, match="switched off"):  # remembered, and told in each process
        assert backends.decide(LARGE).implementation == "reference"
    assert len(runs) == 1
    with pytest.warns(RuntimeWarning, match="float32 d 64"):  # another family is checked for itself
        backends.decide(LARGE._replace(features=64))
    assert len(runs) == 2


def test_a_file_does_not_bring_a_wrong_kernel_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept(choice.default_path())
    monkeypatch.setattr(calibrate, "check", lambda *_: "wrong")
    with pytest.warns(RuntimeWarning, match="switched off"):
        assert backends.decide(LARGE).implementation == "reference"


def test_hardware_with_committed_rows_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.Rule("usage", "cpu", "native", rules.Where(), "rows", choice.hardware("cpu"))
    monkeypatch.setattr(rules, "AUTO", (rule,))
    monkeypatch.setattr(calibrate, "check", lambda *_: pytest.fail("was checked"))
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


def test_an_unchecked_kernel_is_not_taken_where_no_check_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "can_run", lambda device: False)
    reason = choice.distrust("nt_xent", "native", "cpu", torch.float32, 32)
    assert reason is not None
    assert "not checked" in reason
    monkeypatch.undo()
    assert choice.distrust("nt_xent", "native", "cpu", torch.float32, 32) is None


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        *itertools.product(
            (name for name in rules.OPERATORS if name != "augment"), (torch.float32, torch.bfloat16, torch.float64)
        ),
        *itertools.product(("augment",), (torch.float32, torch.uint8)),
    ],
    ids=str,
)
def test_the_kernels_pass_their_check(operator: str, dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert calibrate.check(operator, "native", "cpu", dtype, 24) == "passed"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("operator", rules.OPERATORS)
@pytest.mark.parametrize("training", [True, False])
def test_every_operator_can_be_measured(operator: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    problem = Problem(
        operator, "cpu", torch.float32, 16, rows=64, columns=32 if operator != "nt_xent" else 64, groups=2
    )
    bucket = choice.bucket_of(problem, training)
    measured = calibrate.measure(problem, bucket.training, ["native"], rivals=True)
    assert measured is not None
    expected = {"reference", "native", *(["SDPA"] if operator == "retrieve" else [])}
    assert set(measured.milliseconds) == expected
    assert measured.implementation != "SDPA"


@pytest.mark.parametrize("operator", rules.OPERATORS)
def test_what_is_measured_is_bounded(operator: str) -> None:
    problem = Problem(operator, "cpu", torch.float32, 256, rows=2**20, columns=2**20, groups=2**10)
    small = calibrate.bounded(problem)
    elements = sum(int(torch.tensor(shape).prod()) for shape in shapes_of(small))
    assert elements <= 2**26
    assert choice.work(small) <= 2**30
    if operator == "nt_xent":
        assert small.rows == small.columns
        assert small.rows % 2 == 0
    assert calibrate.bounded(small) == small
    assert calibrate.bounded(SMALL._replace(operator=operator)) == SMALL._replace(operator=operator)


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

    monkeypatch.setattr(calibrate, "measure", measure)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("packed"), lambda _: pytest.fail("unpacked"))
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert seen == [torch.float32]


def test_threads_choose_once(timed: list[Problem]) -> None:
    threads = [threading.Thread(target=backends.decide, args=(LARGE,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timed == [LARGE]


def test_the_command_fills_the_file(timed: list[Problem], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "mine.json"
    assert calibrate.main(["--seconds", "60", "--output", str(place)]) == 0
    assert len(timed) == len(list(calibrate.problems("cpu")))
    found = choice.read(place, "cpu")
    assert NAME not in found.choices
    assert found.choices["nt_xent float32 8 x 256 x 256 x 128 training"].implementation == "native"
    assert set(found.checks.values()) == {"passed"}
    timed.clear()
    assert calibrate.main(["--seconds", "1e-9", "--output", str(place)]) == 0
    assert timed == []
    assert f"kept in {place}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        calibrate.main(["--seconds", "0"])


@pytest.mark.parametrize("command", [calibrate.main, lambda options: env.main(["--check", *options])])
def test_the_command_looks_at_the_file_before_it_measures(
    timed: list[Problem], capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int]
) -> None:
    choice.default_path().parent.mkdir()
    choice.default_path().write_text("{")
    assert command(["--seconds", "60"]) == 2
    assert "is not a file of choices" in capsys.readouterr().err
    assert timed == []
    assert choice.default_path().read_text() == "{"


def test_a_stopped_command_keeps_what_it_measured(
    timed: list[Problem], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = calibrate.measure

    def stopped(*given: Any, **options: Any) -> Measured | None:
        if len(timed) == 2:
            raise KeyboardInterrupt
        return measure(*given, **options)

    monkeypatch.setattr(calibrate, "measure", stopped)
    assert calibrate.main([]) == 130
    assert "stopped; what was measured is kept in" in capsys.readouterr().err
    assert len(choice.read(choice.default_path(), "cpu").choices) == 2


def test_a_calibration_says_how_many_calls_its_time_was_enough_for(timed: list[Problem], tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    count = len(list(calibrate.problems("cpu")))
    for seconds, words in ((60.0, f"{count} of {count} calls measured"), (1e-9, f"0 of {count} calls measured in")):
        calibrate.fill("cpu", tmp_path / "mine.json", seconds, lambda done, text: said.append((done, text)))
        assert said[-1][0] == 1.0
        assert said[-1][1].startswith(words)


def test_times_that_overlap_are_not_kept(monkeypatch: pytest.MonkeyPatch, checked: None) -> None:
    """The choice holds in this process; the next one measures again."""
    assert not calibrate._separate({"reference": [3.0, 2.0, 1.0], "native": [2.5, 2.0, 1.5]})
    assert not calibrate._separate({"reference": [3.0, 3.0], "native": [1.0, 1.0]})
    assert not calibrate._separate({"reference": [0.5, 4.0, 4.0, 4.0, 4.0], "native": [1.0, 1.0, 1.0, 1.0, 1.0]})
    assert calibrate._separate({"reference": [3.0, 4.0, 5.0], "native": [1.0, 2.0, 2.5], "SDPA": [1.0, 2.0, 2.5]})
    monkeypatch.setattr(calibrate, "_separate", lambda seconds: False)
    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    assert backends.decide(LARGE).source == "measured"
    assert content(choice.default_path())["sections"][0]["choices"] == {}


def test_a_measurement_ends() -> None:
    def done(rounds: int, seconds: float, passed: float) -> bool:
        times = {"reference": [2 * seconds] * rounds, "native": [seconds] * rounds}
        return calibrate._done(times, passed)

    assert not done(14, 1e-3, 0.0)  # short calls take more rounds
    assert done(15, 1e-3, 0.0)
    assert not done(2, 0.1, 0.4)
    assert done(3, 0.1, 0.6)
    assert done(1, 5.0, 10.0)  # a busy machine
    assert not calibrate._done({"reference": [], "native": []}, 10.0)
    overlapping = {"reference": [0.1, 0.2, 0.3], "native": [0.1, 0.2, 0.3]}
    assert not calibrate._done(overlapping, 0.2)
    assert calibrate._done(overlapping, 0.3)


def test_how_far_ahead_is_told() -> None:
    told = str(Measured("native", {"reference": 3.0, "native": 1.5, "SDPA": 2.25}))
    assert told == "2.00 times as fast as reference, 1.50 times as fast as SDPA, 1.5 ms"
