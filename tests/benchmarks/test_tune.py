"""The tile_search benchmark, in the interpreter with timers that say what the test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune, tune_report
from benchmarks.harness import rows
from benchmarks.harness.case import case
from benchmarks.harness.measure import Ceilings
from benchmarks.harness.rows import Row

pytest.importorskip("triton")
RETRIEVE = case("retrieve", N=33, M=40, d=24, B=11, dtype="bfloat16")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Three candidates, of which the second is the fastest and the third does not compile; known ceilings."""
    from anomem.kernels import tile_search
    from anomem.kernels.tile_table import INTERPRETED

    found = (INTERPRETED, INTERPRETED._replace(columns=16), INTERPRETED._replace(rows=64, warps=8))

    def timer(call: Any) -> tuple[float, float, float]:
        place = found.index(call.args[0])
        if place == 2:
            raise RuntimeError("PassManager::run failed")
        return 1.0, 4.0 - place, 5.0

    monkeypatch.setattr(tile_search, "candidates", lambda entry, device: found)
    monkeypatch.setattr(tile_search, "measure", timer)
    monkeypatch.setattr(Ceilings, "product", lambda self, dtype: 1e9)
    monkeypatch.setattr(Ceilings, "copy", lambda self: 1e9)
    return found


def test_each_tile_of_each_kernel_makes_a_row(tiles: tuple[Any, ...]) -> None:
    found = list(tune.Sweep("cpu").rows(RETRIEVE))
    kernels = ["retrieve_flash_forward", "retrieve_flash_prototype_sums", "retrieve_flash_query_gradient"]
    assert [row.operator for row in found] == [kernel for kernel in kernels for _ in tiles]
    for row in found:
        assert row.shape == {"rows": 33, "columns": 40, "d": 24}
        assert row.group.startswith("half 64, d=24 dv=24 tied=True beta=False")
    first, second, third = found[:3]
    assert (first.status, first.milliseconds) == (rows.MEASURED, {"p20": 1.0, "p50": 4.0, "p80": 5.0})
    assert first.checked == RETRIEVE.dims
    assert first.flops == 4 * 33 * 40 * 24  # S = Q Kᵀ and O = P V
    assert first.fraction_of_floor == pytest.approx(1e3 * first.flops / 1e9 / 4.0)
    assert second.milliseconds["p50"] == 3.0
    assert (third.status, third.milliseconds) == (rows.FAILED, None)
    assert "PassManager" in third.reason
    assert {"commit", "dirty", "torch", "triton", "cuda", "device_name"} <= set(first.about)


def test_without_neighbours_the_table_alone_is_timed(tiles: tuple[Any, ...]) -> None:
    assert {row.implementation for row in tune.Sweep("cpu", neighbours=False, check=False).rows(RETRIEVE)} == {
        "32x32, 4 warps, 1 stages"
    }


def test_a_tile_with_wrong_numbers_gets_no_time(tiles: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a kernel that compiles into an empty one."""
    from anomem.kernels import retrieve_flash

    whole = retrieve_flash.retrieve_flash_forward_kernel

    class Empty:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                return None if options["BLOCK_M"] == 16 else whole[grid](*args, **options)

            return run

    monkeypatch.setattr(retrieve_flash, "retrieve_flash_forward_kernel", Empty())
    found = [row for row in tune.Sweep("cpu").rows(RETRIEVE) if row.operator == "retrieve_flash_forward"]
    assert [row.status for row in found] == [rows.MEASURED, rows.WRONG, rows.FAILED]
    assert found[1].milliseconds is None
    assert len(tune_report.proposal(found)["retrieve_flash_forward half 64"]) == 1


def test_what_cannot_run_is_a_row_with_its_reason(tiles: tuple[Any, ...]) -> None:
    (row,) = tune.Sweep("cpu").rows(case("retrieve", N=33, M=40, d=24, B=11, dtype="float64"))
    assert row.status == rows.FAILED
    assert "the Triton kernels take float32" in row.reason


def test_every_kernel_of_the_table_has_its_work() -> None:
    from anomem.kernels.tile_table import TABLE

    assert set(tune.WORK) == {kernel for kernel, _, _ in TABLE}


def timed(entry: str, launch: str, times: dict[str, float | None]) -> list[Row]:
    """Rows of one launch; a tile is named by its rows and columns."""
    kernel, _, kind = entry.partition(" ")
    found = []
    for name, time in times.items():
        shape, (tile_rows, tile_columns) = {"rows": 1024, "columns": 64, "d": 64}, map(int, name.split("x"))
        row = Row(
            "tiles", kernel, shape, "bfloat16", False, f"{kind}, {launch}", f"{name}, 4 warps", "work", "measured"
        )
        tile = {"rows": tile_rows, "columns": tile_columns, "warps": 4, "stages": 2}
        row.tile = {**tile, "shared": 20 + len(launch), "registers": 99}
        if time is None:
            row.status, row.reason = rows.FAILED, "spills 8 registers"
        else:
            row.milliseconds, row.fraction_of_floor = {"p20": time, "p50": time, "p80": time}, 0.5
        found.append(row)
    return found


def test_proposal_ranks_what_is_right_in_every_launch() -> None:
    entry = "retrieve_flash_forward half 256"
    measured = [
        *timed(entry, "tied", {"64x64": 1.0, "128x64": 2.0, "64x32": 4.0, "32x32": 8.0, "16x16": 9.0}),
        *timed(entry, "separate", {"64x64": None, "128x64": 3.0, "64x32": 2.0, "32x32": 8.0, "16x16": 9.0}),
    ]
    ranked = tune_report.proposal(measured)[entry]
    assert [(one.tile["rows"], one.tile["columns"]) for one in ranked] == [(128, 64), (64, 32), (32, 32)]
    assert ranked[0].ratio == pytest.approx(3**0.5)  # twice and 1.5 times the fastest
    assert ranked[0].tile["shared"] == 28  # the larger of both launches


TRAINING = case("retrieve", N=40, M=20, d=24, dtype="bfloat16")
READING = case("retrieve", N=40, M=20, d=24, dtype="bfloat16", training=False)
LONG = case("retrieve", N=40, M=20, d=264, dtype="bfloat16", training=False)


def compared(time: tune.Time) -> tune.Schemes:
    return tune.Schemes("cpu", time, lambda call: (call(), 1.0, 2.0, 3.0)[1:])


def test_each_scheme_that_can_run_makes_a_row(tiles: tuple[Any, ...]) -> None:
    def time(call: Callable[[], object]) -> tuple[float, ...]:
        call()
        return 1.0, 2.0, 3.0

    for one, names in ((TRAINING, "chunked flash"), (READING, "chunked flash resident"), (LONG, "chunked resident")):
        found = list(compared(time).compare(one))
        assert [row.implementation for row in found] == names.split()
        assert all(row.milliseconds == {"p20": 1.0, "p50": 2.0, "p80": 3.0} for row in found)
    assert found[0].flops == 4 * 40 * 20 * 264


def test_schemes_compute_the_same() -> None:
    results: dict[str, list[torch.Tensor]] = {}
    for one in (TRAINING, READING):
        for name, call in tune.Pass(one, "cpu").schemes().items():
            results[name] = [tensor.float() for tensor in call() if tensor is not None]
        first, *others = results.values()
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                mine, theirs = (x.sum(0) if x.dim() == 3 else x for x in (mine, theirs))  # partial sums
                torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
        results.clear()


def test_scratch_is_swept_and_put_back(tiles: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels import primitives

    monkeypatch.setattr(tune, "SCRATCHES", (tune.MIB, 2 * tune.MIB))
    seen: list[int] = []

    def time(call: Callable[[], object]) -> tuple[float, ...]:
        seen.append(primitives.SCRATCH_BYTES)
        if len(seen) == 2:
            raise RuntimeError("no memory")
        return 1.0, 2.0, 3.0

    usual = primitives.SCRATCH_BYTES
    found = list(compared(time).scratches(TRAINING))
    assert usual == primitives.SCRATCH_BYTES
    assert seen == [tune.MIB, 2 * tune.MIB]
    graph = tune_report.IN_A_GRAPH
    assert [row.implementation for row in found] == ["1 MiB", f"1 MiB{graph}", "2 MiB", f"2 MiB{graph}"]
    assert (found[2].status, found[2].reason) == (rows.FAILED, "RuntimeError: no memory")


def test_questions_are_answered_from_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def scheme(name: str, time: float, group: str) -> Row:
        row = Row("schemes", "retrieve", {"N": 9, "M": 5, "d": 128}, "bfloat16", True, group, name, "work", "measured")
        row.milliseconds, row.fraction_of_floor = {"p20": time, "p50": time, "p80": time}, 0.5
        return row

    measured = [
        *timed("retrieve_flash_forward half 256", "tied", {"64x64": 1.5, "128x64": 1.25, "64x32": None}),
        scheme("flash", 2.0, "backward"),
        scheme("chunked", 3.0, "backward"),
        scheme("6 MiB", 4.0, "forward"),
        scheme(f"6 MiB{tune_report.IN_A_GRAPH}", 3.5, "forward"),
    ]
    told = list(tune_report.answers(measured))
    assert told[:4] == [
        "retrieval forward, d = 256, N = 1024: 64x64 1.5 ms, 128x64 1.25 ms",
        "retrieval backward, d = 128, M = 5, N = 9: flash 2 ms, chunked 3 ms",
        "retrieval forward, d = 128, M = 5, N = 9, scratch, from the host: 6 MiB 4 ms",
        "retrieval forward, d = 128, M = 5, N = 9, scratch, in a CUDA graph: 6 MiB 3.5 ms",
    ]
    tune_report.show(measured)
    printed = capsys.readouterr().out
    for part in (*told, "Tile(128, 64, 4, 2, 24),  # 1.000", "Tile(64, 64, 4, 2, 24),  # 1.200", "spills 8 registers"):
        assert part in printed


def test_a_run_keeps_each_row_and_fails_on_wrong_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    right, wrong = timed("retrieve_flash_forward half 256", "tied", {"64x64": 1.5, "128x64": None})
    monkeypatch.setattr(tune, "obstacle", lambda: None)
    monkeypatch.setattr(
        tune, "about", lambda device: {"device_name": "a GPU", "torch": "2", "triton": "3", "commit": "1"}
    )
    monkeypatch.setattr(tune, "plan", lambda device, options: [(READING, lambda one: iter([right, wrong]))])
    for status, code in ((rows.FAILED, 0), (rows.WRONG, 1)):
        wrong.status = status
        assert tune.main(tune.Options(json=str(path))) == code
        assert [row.implementation for row in rows.read(path)] == ["64x64, 4 warps", "128x64, 4 warps"]
    assert tune.main(tune.Options(json=str(path), filter="nothing")) == 2
    assert READING.title in capsys.readouterr().out


def test_the_plan_asks_the_quick_questions_first() -> None:
    parts = tune.plan("cpu", tune.Options())
    assert len(parts) == len(tune.scheme_cases()) + len(tune.scratch_cases()) + len(tune.tile_cases())
    assert parts[0][0] == tune.scheme_cases()[0]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(tune.Options()) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "TRITON_INTERPRET is set" in str(tune.obstacle())
