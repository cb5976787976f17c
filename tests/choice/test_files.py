"""Where a choice is kept and read: files of this machine and of others, the environment, damaged files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anomem import backends, choice, machine
from anomem.choice import Choice
from anomem.rules import Problem
from tests.choice.large_call import LARGE, NAME, content, kept, new_process


def test_a_large_call_is_measured_once_and_kept(timed: list[Problem]) -> None:
    found = backends.decide(LARGE)
    assert found == Choice("native", "measured", "2.00 times as fast as reference, 1 ms")
    assert backends.decide(LARGE._replace(rows=510, columns=510)) == found  # the same bucket
    assert timed == [LARGE]
    (section,) = content(choice.default_path())["sections"]
    assert (section["hardware"], section["software"]) == machine.identity("cpu")
    assert section["choices"] == {NAME: {"implementation": "native", "milliseconds": {"reference": 2.0, "native": 1.0}}}
    assert section["checks"] == {"native nt_xent float32 d 32": "passed"}
    new_process()
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == [LARGE]


def test_a_choice_does_not_change_within_a_process(timed: list[Problem]) -> None:
    before = backends.decide(LARGE)
    kept(choice.default_path(), "reference")
    assert backends.decide(LARGE) == before
    backends._decided.clear()
    assert backends.decide(LARGE) == before
    new_process()
    assert backends.decide(LARGE)[:2] == ("reference", "file")


def test_each_number_of_threads_has_its_section(timed: list[Problem]) -> None:
    """What one thread measured stood in the section of two."""
    threads = torch.get_num_threads()
    try:
        for count, features in ((1, 32), (2, 64)):
            torch.set_num_threads(count)
            backends.decide(LARGE._replace(features=features))
    finally:
        torch.set_num_threads(threads)
    sections = content(choice.default_path())["sections"]
    assert [(s["hardware"].rpartition(", ")[2], len(s["choices"])) for s in sections] == [
        ("1 threads", 1),
        ("2 threads", 1),
    ]


@pytest.mark.parametrize("field", ["hardware", "software"])
def test_the_file_of_another_machine_is_not_used_and_stays(timed: list[Problem], field: str) -> None:
    kept(choice.default_path(), "reference", **{field: "another one"})
    assert backends.decide(LARGE)[:2] == ("native", "measured")
    sections = content(choice.default_path())["sections"]
    # The same hardware with other software is replaced.
    assert [s[field] for s in sections] == (
        ["another one", machine.identity("cpu")[0]] if field == "hardware" else [machine.identity("cpu")[1]]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"implementation": "native"', '"implementation": "fast"'),
        lambda text: text.replace("1.5", '"fast"'),
        lambda text: text.replace("1.5", "true"),
        lambda text: text.replace("1.5", "Infinity"),
        lambda text: text.replace(NAME, "nonsense"),
        lambda text: text.replace("nt_xent float32", "nt_xent float33"),
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


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_where_warnings_are_errors_the_first_call_raises_and_the_next_ones_run(
    timed: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call raised, and checked and measured again."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    new_process()
    for _ in range(2):  # the check and the choice are not kept
        with pytest.raises(RuntimeWarning, match="not kept: cannot write"):
            backends.decide(LARGE)
    assert backends.decide(LARGE)[:2] == ("native", "measured")
    assert timed == [LARGE]


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "ANOMEM_CHOICE"])
def test_a_folder_that_cannot_be_looked_into_is_a_warning(
    timed: list[Problem], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A name too long for the system fails as a folder that is closed to the user does, also for root."""
    monkeypatch.setenv(name, f"/tmp/{'x' * 300}")
    new_process()
    with pytest.warns(
        RuntimeWarning, match="no choices of this machine are used|the committed table and the rules decide"
    ) as warned:
        backends.decide(LARGE)
    said = str(warned[0].message)
    assert ("ANOMEM_CHOICE, expected measure, table or a file that can be read" in said) == (name == "ANOMEM_CHOICE")
    assert warned[0].filename == __file__  # the line that made the call


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
    with pytest.warns(RuntimeWarning, match="the committed table and the rules decide"):
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


@pytest.mark.parametrize("field", ["hardware", "software"])
def test_a_named_file_of_another_machine_is_a_warning(
    timed: list[Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str
) -> None:
    kept(tmp_path / "theirs.json", "native", **{field: "another one"})
    monkeypatch.setenv("ANOMEM_CHOICE", str(tmp_path / "theirs.json"))
    new_process()
    with pytest.warns(
        RuntimeWarning, match="theirs.json has nothing for .* the committed table and the rules"
    ) as warned:
        assert backends.decide(LARGE)[:2] == ("reference", "default")
    assert machine.hardware("cpu") in str(warned[0].message)
    assert warned[0].filename == __file__


def test_ranks_of_a_job_follow_no_file_but_a_named_one(timed: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(choice.default_path())
    monkeypatch.setattr(choice, "_is_a_job", lambda: True)
    assert backends.decide(LARGE)[:2] == ("reference", "default")
    monkeypatch.setenv("ANOMEM_CHOICE", str(choice.default_path()))
    new_process()
    assert backends.decide(LARGE)[:2] == ("native", "file")
    assert timed == []
