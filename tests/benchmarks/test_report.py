"""README and docs/PERFORMANCE.md say what the rows say."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from benchmarks.harness import rows
from benchmarks.harness.case import case
from benchmarks.harness.rows import RESULTS, ROOT, Row, Step, row_for
from benchmarks.report import pages, pictures, speeds, tables
from benchmarks.report.tables import load

ABOUT = {
    "commit": "0123456789ab",
    "dirty": False,
    "torch": "2.14.1",
    "triton": None,
    "cuda": None,
    "device": "cpu",
    "device_name": "x86_64 AVX512",
    "threads": 2,
}


def measured(suite: str, one, name: str, milliseconds: float, peak: int) -> Row:
    row = row_for(suite, one, name, "work", rows.MEASURED)
    row.milliseconds = {"p20": 0.9 * milliseconds, "p50": milliseconds, "p80": 1.1 * milliseconds}
    row.peak_bytes, row.flops, row.bytes = peak, 1e9, 1e7
    row.floor_milliseconds, row.fraction_of_floor = 4.0, 4.0 / milliseconds
    row.ceilings = {"product_flops": 1e11, "copy_bytes": 1e10}
    row.about = ABOUT
    return row


@pytest.fixture
def results(tmp_path) -> Path:
    one = case("nt_xent", G=2, B=64, d=32, group="large")
    times = {"eager": 20.0, "eager baddbmm": 16.0, "native": 8.0}
    for name, milliseconds in times.items():
        rows.append(tmp_path / "cpu-kernels.jsonl", measured("kernels", one, name, milliseconds, 2**20))
    for size, eager, native in ((128, 1.0, 2.0), (512, 20.0, 8.0), (2048, None, 90.0)):
        swept = case("nt_xent", G=1, B=size, d=32, group="over B")
        if eager:
            rows.append(tmp_path / "cpu-scaling.jsonl", measured("scaling", swept, "eager", eager, 2**20))
        else:
            row = measured("scaling", swept, "eager", 1.0, 0)
            row.status, row.milliseconds, row.reason = rows.OUT_OF_MEMORY, None, "OOM at 1 GiB"
            rows.append(tmp_path / "cpu-scaling.jsonl", row)
        rows.append(tmp_path / "cpu-scaling.jsonl", measured("scaling", swept, "native", native, 2**18))
    return tmp_path


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_say_what_the_rows_say(page) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- rows: " in text
    assert pages.render(text, RESULTS) == text, "run `python -m benchmarks.report`"


def marked(page: str, name: str) -> str:
    section = re.search(
        rf"<!-- rows: {name} -->(.*?)<!-- end -->", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
    )
    assert section is not None
    return section[1]


def test_figures_of_the_summary_are_the_rows_figures() -> None:
    # Independently of the renderer: every time of the CPU's table is a median of a committed row.
    found = [*load(RESULTS, "cpu", "kernels"), *load(RESULTS, "cpu", "training")]
    medians = {f"{row.implementation} {tables.number(row.milliseconds['p50'])}" for row in found if row.milliseconds}
    lines = [line for line in marked("docs/PERFORMANCE.md", "cpu-summary").splitlines() if line.startswith("| `")]
    assert lines
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert f"eager {cells[1]}" in medians
        for cell in cells[2:4]:
            value, _, name = cell.partition(" (")
            assert cell == "–" or f"{name.removesuffix(')')} {value}" in medians


def test_figures_of_the_readme_are_quotients_of_rows() -> None:
    """Independently of the renderer: of batch norm on the third processor, whose cases the table of PERFORMANCE has."""
    lines = marked("docs/PERFORMANCE.md", "cpu-amx-summary").splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| `batch_norm`")]
    fastest = sorted(min(float(cell.strip(" ×")) for cell in line[5:7]) for line in cells)
    (line,) = (line for line in marked("README.md", "speeds").splitlines() if line.startswith("| batch norm |"))
    found = [float(number) for number in re.findall(r"[\d.]+", line.split("|")[4])]
    assert found[1:] == [fastest[0], fastest[-1]]
    assert found[0] == pytest.approx(sum(fastest[4:6]) / 2, abs=0.011)  # of ten


def test_summary_compares_within_a_case(results) -> None:
    text = tables.SECTIONS["cpu-summary"](results)
    assert "| `nt_xent` G 2, B 64, d 32 (large) | 20.0 | 16.0 (eager baddbmm) | 8.00 (native) | 2.50× | 2.00× |" in text
    assert "x86_64 AVX512, 2 threads" in text
    assert "Commit 0123456789ab." in text


def test_the_readme_has_a_column_for_each_machine(results) -> None:
    one = case("retrieve", N=64, M=8, d=32, B=8)
    for name, milliseconds in {"eager": 4.0, "SDPA flash folded": 3.0, "native": 2.0}.items():
        rows.append(results / "cpu-amx-kernels.jsonl", measured("kernels", one, name, milliseconds, 2**20))
    text = speeds.speeds(results)
    assert "| operator | AMD family 26 | Intel family 6, AMX |" in text
    assert "| retrieval | – | 1.50× |" in text
    assert "| NT-Xent | 2.00× | – |" in text
    assert "- AMD family 26: x86_64 AVX512, 2 threads" in text
    assert text.endswith("- Not measured on a GPU yet.")


def test_grid_names_each_rival_and_what_has_no_time(results) -> None:
    one = case("nt_xent", G=16, B=64, d=32, group="grid")
    for name, milliseconds in {"eager": 20.0, "torch.compile": 10.0, "eager baddbmm": 16.0, "native": 4.0}.items():
        row = measured("grid", one, name, milliseconds, 2**20)
        row.compile_seconds = 4.5 if name == "torch.compile" else None
        rows.append(results / "cpu-grid.jsonl", row)
    slow = measured("grid", one, "lightly", 1.0, 0)
    slow.status, slow.milliseconds, slow.reason = rows.OVER_TIME, None, "over 2 s: one call took 3.0 s"
    rows.append(results / "cpu-grid.jsonl", slow)
    text = tables.SECTIONS["cpu-grid"](results)
    assert "| 20.0 | 10.0 (compiled in 4.50 s) | 16.0 (eager baddbmm) | 4.00 (native) | 5.00× | 2.50× | 4.00× |" in text
    assert "lightly: over time, over 2 s: one call took 3.0 s." in text


def test_limits_and_crossovers_name_sizes(results) -> None:
    assert "| B = 512 in 20.0 ms | B = 2048: OOM at 1 GiB |" in tables.SECTIONS["cpu-limits"](results)
    assert "changes between B = 128 and 512" in tables.SECTIONS["cpu-crossovers"](results)


def test_other_revisions_stay_out_of_the_report(results) -> None:
    row = copy.deepcopy(load(results, "cpu", "kernels")[-1])
    row.revision, row.milliseconds = "v0 (abc)", {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    before = tables.SECTIONS["cpu-kernels"](results)
    rows.append(results / "cpu-kernels.jsonl", row)
    assert tables.SECTIONS["cpu-kernels"](results) == before


def test_without_rows_it_says_so(tmp_path) -> None:
    for name, section in tables.SECTIONS.items():
        assert "easured" in section(tmp_path) or name.endswith("losses")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_phases_of_a_committed_step_add_up_to_it(device) -> None:
    for row in rows.read(RESULTS / f"{device}-steps.jsonl", Step):
        share = sum(row.milliseconds.values()) / (1e3 * row.seconds_per_step)
        # On a GPU the phases are the time of kernels, which can run on several streams.
        assert 0.8 < share < (1.25 if device == "cpu" else 2.0), row.pipeline


def test_unknown_marker_is_an_error(tmp_path) -> None:
    with pytest.raises(KeyError, match="no section"):
        pages.render("<!-- rows: gpu-tables -->\n<!-- end -->", tmp_path)


def test_pictures_are_drawn_from_rows(results, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    drawn = pictures.draw_all(results, tmp_path / "pictures")
    assert {path.name for path in drawn} == {"cpu-scaling-nt_xent.png", "cpu-roofline.png"}
    assert all(path.stat().st_size > 10_000 for path in drawn)
