"""The table of launches and memory counted without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.counts import RESULT, SUITE, Options, main
from benchmarks.harness import rows
from benchmarks.harness.case import case
from benchmarks.harness.rows import Row, row_for
from benchmarks.host_time import RESULT as HOST_RESULT
from benchmarks.report import counts

ABOUT = {"commit": "0123456789ab", "dirty": False, "torch": "2.14.1", "triton": "3.8.0"}


def counted(name: str, size: int, launches: int | None, peak: int | None, status: str = rows.COUNTED) -> Row:
    one = case("nt_xent", G=1, B=size, d=64, dtype="bfloat16", group="over B")
    made = row_for(SUITE, one, name, "work", status)
    made.launches, made.peak_bytes, made.about = launches, peak, ABOUT
    return made


@pytest.fixture
def results(tmp_path: Path) -> Path:
    made = [
        counted("eager", 128, 65, 2**22),
        counted("chunks", 128, 900, 2**21),
        counted("another", 128, 30, 2**23),
        counted("triton", 128, 6, 2**20),
        counted("eager", 256, None, None, rows.OUT_OF_MEMORY),
        counted("another", 256, None, None, rows.UNAVAILABLE),
        counted("triton", 256, 6, 2**21),
    ]
    rows.write(tmp_path / RESULT.name, made)
    return tmp_path


def test_a_line_has_kernels_and_memory_and_the_leanest_rival(results: Path) -> None:
    lines = [line for line in counts.section(results).splitlines() if line.startswith("| `")]
    assert lines == [
        "| `nt_xent` G 1, B 128, d 64, bfloat16 (over B) | 65 kernels, 4.00 MiB | – | "
        "900 kernels, 2.00 MiB (chunks) | 6 kernels, 1.00 MiB | – |",
        "| `nt_xent` G 1, B 256, d 64, bfloat16 (over B) | out of memory | – | – | 6 kernels, 2.00 MiB | – |",
    ]


def test_without_rows_nothing_is_claimed(tmp_path: Path) -> None:
    assert counts.section(tmp_path) == "Not counted yet."
    assert counts.draw(tmp_path, tmp_path) is None


def test_the_picture_is_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = counts.draw(results, tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_host_time_is_shown_of_both_revisions_against_eager(tmp_path: Path) -> None:
    assert counts.host_section(tmp_path) == "Not measured yet."
    made = [counted("eager", 128, 65, None), counted("triton", 128, 6, None), counted("triton", 128, 6, None)]
    made += [counted("eager", 256, 65, None), counted("triton", 256, 6, None)]  # another size of the same operator
    made[2].revision = "main (0123)"
    for row, p50 in zip(made, (0.6, 0.3, 1.2, 1.0, 0.5), strict=True):
        row.milliseconds = {"p20": p50 / 2, "p50": p50, "p80": p50 * 2}
        row.about = {**ABOUT, "device_name": "a processor"}
    rows.write(tmp_path / HOST_RESULT.name, made)
    lines = counts.host_section(tmp_path).splitlines()
    assert [line.split(" | ")[1:] for line in lines[-5:]] == [
        ["eager", "65", "600 (300 to 1200)", "1.00× |"],
        ["triton", "6", "300 (150 to 600)", "2.00× |"],
        ["triton at main (0123)", "6", "1200 (600 to 2400)", "0.50× |"],
        ["eager", "65", "1000 (500 to 2000)", "1.00× |"],
        ["triton", "6", "500 (250 to 1000)", "2.00× |"],
    ]


def test_rows_to_keep_must_be_there(results: Path) -> None:
    before = (results / RESULT.name).read_bytes()
    for keep in (("another",), (ABOUT["commit"], "another")):
        assert main(Options(json=results / RESULT.name, keep=keep)) == 2
    assert (results / RESULT.name).read_bytes() == before
