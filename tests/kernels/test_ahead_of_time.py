"""Every shipped tile compiles for sm_80, sm_90 and sm_100 without a GPU, as the committed table says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "anomem.kernels.ahead_of_time", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(2400)
def test_every_tile_compiles_as_committed() -> None:
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_floor_and_the_present_triton_have_the_same_rows() -> None:
    from anomem.kernels.ahead_of_time import committed_rows, shipped

    rows = committed_rows()
    keys = set(shipped())
    assert set(rows) == {"3.6", "3.8"}
    for release, table in rows.items():
        assert set(table) == keys, release


def test_every_tile_of_the_table_is_compiled_in_every_role() -> None:
    from anomem.kernels.ahead_of_time import shipped
    from anomem.kernels.tile_table import TABLE

    roles = {
        "retrieve_flash_forward": {"tied", "separate"},
        "retrieve_flash_query_gradient": {"tied", "separate"},
        "retrieve_flash_prototype_sums": {"tied", "keys", "values"},
        "retrieve_resident": {""},
        "contrast_forward": {"joined", "rectangle"},
        "contrast_backward": {"joined", "rows", "columns"},
    }
    fixed = {"contrast_forward": {"joined fixed", "rectangle fixed"}, "contrast_backward": {"joined fixed"}}
    for (kernel, kind, block), tiles in TABLE.items():
        wanted = roles[kernel] | (fixed.get(kernel, set()) if kind != "ieee" else set())
        width = 512 if kernel == "retrieve_resident" else block
        for architecture, candidates in tiles.items():
            for tile in candidates:
                for role in wanted:
                    key = f"{kernel} {role} {kind} d{width} {tile.rows}x{tile.columns} sm_{architecture}"
                    spec = shipped()[key.replace("  ", " ")]
                    assert (spec.architecture, spec.tile) == (architecture, tile)
                    assert spec.options == tile.options


def test_faults_are_found() -> None:
    from anomem.kernels.ahead_of_time import MATRIX_INSTRUCTION, Row, faults, shipped

    sound, bad = {}, {}
    broken = (
        {"loop_spills": 4}, {"serialised": True}, {"products": 2.0}, {"blocks": 0}, {"shared": 300 * 1024},
        {"matrix": "none"}, {"scratch": 8},
    )  # fmt: skip
    for key, spec in shipped().items():
        matrix = MATRIX_INSTRUCTION[spec.architecture] if spec.matrix else "none"
        sound[key] = Row(128, 0, 0, 4, matrix, 0, False, 0, 0, 1.0, False)
    assert list(faults(sound, sound)) == []
    key = next(key for key, spec in shipped().items() if spec.matrix)
    for change in broken:
        bad = sound | {key: sound[key]._replace(**change)}
        found = list(faults(bad, None))
        assert len(found) == 1, (change, found)
        assert key in found[0]
    fewer = sound | {key: sound[key]._replace(blocks=3)}
    assert [fault for fault in faults(fewer, sound) if "committed 4" in fault]
    missing = {name: row for name, row in sound.items() if name != key}
    assert "no longer compiled" in next(faults(missing, sound))
    assert "not in" in next(faults(sound, missing))
