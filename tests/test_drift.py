"""The conformal martingale: its bound on exchangeable streams, its delay on drifting ones, and the command."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from anomem.cli import main
from anomem.drift import Martingale, OnlinePValues, steps_of
from anomem.errors import ArgumentError


def streams(count: int, length: int, shift: float, calibration: int = 40) -> list[Martingale]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        p_of = OnlinePValues(torch.randn(calibration, generator=generator), seed)
        scores = torch.randn(length, generator=generator) + shift
        found.append(Martingale(0.1).over(p_of(float(score)) for score in scores))
    return found


def test_false_alarms_stay_below_the_bound() -> None:
    """Fewer calibration scores than images: online p-values stay independent. 150 streams: 0.1 + two deviations."""
    alarms = sum(m.alarm_at is not None for m in streams(150, 150, 0.0))
    assert alarms / 150 <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 150)


def test_drift_is_found() -> None:
    found = streams(20, 150, 1.5)
    assert all(m.alarm_at is not None and m.alarm_at < 60 for m in found)


def test_capital_is_the_integral() -> None:
    """One p: ∫ ε p^(ε − 1) dε = (p ln p − p + 1) / (p ln² p)."""
    for p in (0.01, 0.2, 0.7):
        expected = (p * math.log(p) - p + 1) / (p * math.log(p) ** 2)
        assert 10 ** Martingale().over([p]).log_capital == pytest.approx(expected, rel=1e-4)


def test_online_p_values_are_uniform() -> None:
    p_of = OnlinePValues(torch.zeros(3))  # ties only: smoothing alone decides
    found = torch.tensor([p_of(0.0) for _ in range(2000)])
    assert float(found.min()) > 0
    assert float(found.max()) <= 1
    assert abs(float(found.mean()) - 0.5) < 0.03


def test_single_anomalies_are_no_drift() -> None:
    p_values = [0.0005 if i % 4 == 0 else 0.3 + 0.2 * (i % 4) for i in range(100)]
    assert Martingale(ignore=0.01).over(p_values).alarm_at is None
    assert Martingale(ignore=0.0).over(p_values).alarm_at is not None


def test_wrong_arguments() -> None:
    for arguments in ({"false_alarm": 0.0}, {"ignore": 1.0}):
        with pytest.raises(ArgumentError):
            Martingale(**arguments)
    with pytest.raises(ArgumentError, match="p"):
        Martingale().update(0.0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("path,both,p_value\n" + "".join(f"{i}.png,1.0,{(37 * i % 99 + 1) / 100}\n" for i in range(99)))
    assert main(["drift", str(file)]) == 0
    assert "no drift in 99 images" in capsys.readouterr().out
    file.write_text("path,both,p_value\n" + "".join(f"{i}.png,1.0,0.05\n" for i in range(50)))
    assert main(["drift", str(file)]) == 1
    assert "drift after" in capsys.readouterr().out
    for content, sentence in (
        ("path\na\n", "column p_value"),
        ("p_value\n", "received none"),
        ("p_value\n7\n", "at most 1"),
        ("p_value\n0\n0.5\n", "above 0"),
        ("p_value\n-1\n", "above 0"),
        ("p_value\n0.5\nnan\n", "finite numbers"),
        ('p_value\n0.5\n""\n0.5\n', "column p_value"),
    ):
        file.write_text(content)
        assert main(["drift", str(file)]) == 2
        said = capsys.readouterr().err
        assert (said.count("\n"), sentence in said) == (1, True), said
    assert main(["drift", str(tmp_path / "none.csv")]) == 2
    (tmp_path / "huge.json").write_text('[{"p_value": 1' + "0" * 400 + "}]")
    assert main(["drift", str(tmp_path / "huge.json")]) == 2
    file.write_text("p_value\n1e-320\n")  # the smallest step is no number of steps
    assert main(["drift", str(file)]) == 0


def test_short_and_constant_streams_raise_no_alarm(tmp_path: Path) -> None:
    """A stream at the calibration's median: its smallest p-value is not the step of the p-values."""
    file = tmp_path / "scores.csv"
    for p, count in ((0.5, 60), (0.5, 1), (1.0, 60), (0.34, 2)):
        file.write_text("p_value\n" + f"{p}\n" * count)
        assert main(["drift", str(file)]) == 0, (p, count)


def test_steps_are_read_off_the_p_values() -> None:
    for steps in (100, 129, 353):
        some = [k / steps for k in range(3, steps, 7)]  # the smallest is not 1/steps
        assert steps_of([*some, 1.0]) == steps
    assert steps_of([0.5] * 50) is None
    assert steps_of(torch.rand(50, dtype=torch.float64).tolist()) is None


def test_lines_of_json_and_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, table = tmp_path / "scores.jsonl", tmp_path / "scores.csv"
    lines.write_text('{"path": "a", "p_value": 0.5}\n\n{"path": "b", "p_value": 0.6}\n')
    table.write_text("\ufeffp_value\n0.5\n0.6\n", encoding="utf-8")
    for file in (lines, table):
        assert main(["drift", str(file)]) == 0
        assert "no drift in 2 images" in capsys.readouterr().out
