"""The commands that measure ahead: `python -m anomem.calibrate` and `python -m anomem.env --check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomem import calibrate, choice, env, machine, measuring
from anomem.machine import Measured
from anomem.rules import Problem
from tests.choice.large_call import NAME


def test_the_command_fills_the_file(timed: list[Problem], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "mine.json"
    assert calibrate.main(["--seconds", "60", "--output", str(place)]) == 0
    assert len(timed) == len(list(calibrate.problems("cpu")))
    found = machine.read(place, "cpu")
    assert NAME not in found.choices
    assert found.choices["nt_xent float32 8 x 256 x 256 x 128 training"].implementation == "native"
    assert set(found.checks.values()) == {"passed"}
    timed.clear()
    assert calibrate.main(["--seconds", "1e-9", "--output", str(place)]) == 0
    assert timed == []
    said = capsys.readouterr().err
    assert f'kept in {place}; impl="auto" follows it with ANOMEM_CHOICE={place}' in said
    with pytest.raises(SystemExit):
        calibrate.main(["--seconds", "0"])


@pytest.mark.parametrize(
    ("mode", "words"), [("measure", "\n"), ("table", '; impl="auto" follows it without ANOMEM_CHOICE\n')]
)
def test_the_command_says_whether_its_file_is_followed(
    timed: list[Problem], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    monkeypatch.setenv("ANOMEM_CHOICE", mode)
    choice.forget()
    assert calibrate.main(["--seconds", "1e-9"]) == 0
    assert capsys.readouterr().err.endswith(f"kept in {choice.default_path()}{words}")


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
    measure = measuring.measure

    def stopped(*given: Any, **options: Any) -> Measured | None:
        if len(timed) == 2:
            raise KeyboardInterrupt
        return measure(*given, **options)

    monkeypatch.setattr(measuring, "measure", stopped)
    assert calibrate.main([]) == 130
    assert "stopped; what was measured is kept in" in capsys.readouterr().err
    assert len(machine.read(choice.default_path(), "cpu").choices) == 2


def test_a_calibration_says_how_many_calls_its_time_was_enough_for(timed: list[Problem], tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    count = len(list(calibrate.problems("cpu")))
    for seconds, words in ((60.0, f"{count} of {count} calls measured"), (1e-9, f"0 of {count} calls measured in")):
        calibrate.fill("cpu", tmp_path / "mine.json", seconds, lambda done, text: said.append((done, text)))
        assert said[-1][0] == 1.0
        assert said[-1][1].startswith(words)
