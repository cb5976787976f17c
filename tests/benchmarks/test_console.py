"""The command line without tyro must mean the same as with it."""

from __future__ import annotations

import sys

import pytest

from benchmarks import console
from benchmarks.run import Options

LINES = [
    [],
    ["--suite", "smoke", "--device", "cpu", "--filter", "nt_xent G=4", "--json", "rows.jsonl"],
    ["--no-resume", "--base", "HEAD~1", "--seconds", "2.5", "--memory", "3"],
]


@pytest.mark.parametrize("line", LINES, ids=len)
def test_argparse_reads_what_tyro_reads(line, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *line])
    with_tyro = console.parse(Options, "")
    monkeypatch.setattr(console, "has", lambda package: False)
    assert console.parse(Options, "") == with_tyro


@pytest.mark.parametrize("line", [["--suit", "kernels"], ["--suite", "unknown"], ["--seconds", "soon"]])
@pytest.mark.parametrize("installed", [True, False])
def test_wrong_options_end_the_program(line, installed, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *line])
    if not installed:
        monkeypatch.setattr(console, "has", lambda package: False)
    with pytest.raises(SystemExit) as ended:
        console.parse(Options, "")
    assert ended.value.code == 2
    capsys.readouterr()


def test_tables_are_plain_without_rich(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "has", lambda package: False)
    console.table("title", ("name", "ms"), [("eager", "1.5"), ("native", "10")])
    assert capsys.readouterr().out.splitlines() == ["", "title", "name     ms", "eager   1.5", "native   10"]
