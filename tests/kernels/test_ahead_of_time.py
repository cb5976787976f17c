"""Every shipped tile compiles for every architecture without a GPU, as the committed table says."""

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
    # Triton before 3.8 is refused on sm_100 and compiles nothing for it.
    assert {key for key in rows["3.8"] if "sm_100" not in key} == set(rows["3.6"])
    assert keys in (set(rows["3.8"]), set(rows["3.6"]))


def test_every_tile_of_the_table_is_compiled_in_every_role() -> None:
    from anomem.kernels.ahead_of_time import shipped
    from anomem.kernels.tile_table import TABLE, tiles_of

    roles = {
        "retrieve_flash_forward": {"tied", "separate"},
        "retrieve_flash_query_gradient": {"tied", "separate"},
        "retrieve_flash_prototype_sums": {"tied", "keys", "values"},
        "retrieve_resident": {""},
        "contrast_forward": {"joined", "rectangle"},
        "contrast_backward": {"joined", "rows", "columns"},
    }
    fixed = {"contrast_forward": {"joined fixed", "rectangle fixed"}, "contrast_backward": {"joined fixed"}}
    for kernel, kind, block in TABLE:
        wanted = roles[kernel] | (fixed.get(kernel, set()) if kind != "ieee" else set())
        width = 512 if kernel == "retrieve_resident" else block
        for architecture in {spec.architecture for spec in shipped().values()}:
            brief = architecture in (86, 120)  # the best tile, a tied memory and a learned temperature
            if brief:
                wanted = (wanted & {"tied", "joined", "rectangle", "rows", "columns", ""}) if kind != "ieee" else set()
            for tile in tiles_of((kernel, kind, block), architecture)[: 1 if brief else None]:
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
    around = sound | {key: sound[key]._replace(spills=16)}
    assert list(faults(around, around)) == []
    chained = {name: row._replace(chained=True) for name, row in sound.items()}
    on_100 = [key for key in sound if "sm_100" in key]
    assert [fault.partition(":")[0] for fault in faults(chained, sound)] == on_100
    odd = next(key for key in shipped() if key.endswith("sm_90 odd"))  # known where the committed row has it
    serialised = sound | {odd: sound[odd]._replace(serialised=True)}
    assert len(list(faults(serialised, sound))) == 1
    assert list(faults(serialised, serialised)) == []
    fewer = sound | {key: sound[key]._replace(blocks=3)}
    assert [fault for fault in faults(fewer, sound) if "committed 4" in fault]
    missing = {name: row for name, row in sound.items() if name != key}
    assert "no longer compiled" in next(faults(missing, sound))
    assert "not in" in next(faults(sound, missing))


SASS = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   LDL R2, [R1] ;
.L_x_1:
        /*0030*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   LDL R3, [R1] ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_loops_with_a_matrix_instruction_are_found() -> None:
    """The spill before the loop and the one after it are outside; the inner loop's product counts once."""
    from anomem.kernels.ahead_of_time import Loops

    loops = Loops(SASS, matrix_only=True)
    assert loops.spills == 1
    assert loops.multiplications(warps=4) == 4 * 16 * 8 * (16 + 8)
    assert Loops(SASS, matrix_only=False).spills == 3


def test_products_of_one_accumulator_are_found() -> None:
    from anomem.kernels.ahead_of_time import chains_products

    one = "%a = tt.dot %x, %y, %zero, inputPrecision = tf32\n%b = tt.dot %p, %q, %arg5 : tensor<64x64xf32>"
    assert not chains_products(one)
    assert chains_products(one + "\n%c_1 = tt.dot %r, %s, %b : tensor<64x64xf32>")


def test_the_tied_sums_have_two_accumulators_on_sm_100() -> None:
    from anomem.kernels.ahead_of_time import shipped

    for key, spec in shipped().items():
        if key.startswith("retrieve_flash_prototype_sums tied"):
            assert spec.constants["TWO_SUMS"] is (spec.architecture == 100), key
