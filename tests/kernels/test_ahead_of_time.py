"""Every shipped tile compiles for every architecture without a GPU, as the committed table says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "anomem.kernels.ahead_of_time", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1200)
def test_every_tile_compiles_as_committed() -> None:
    """Those that differ from what was committed, and a fixed sample of the others; `make test-ahead` compiles all."""
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr


SOURCE = """import triton
import triton.language as tl
CONSTANT = tl.constexpr(1)

@triton.jit
def called(a):
    return a

@triton.jit
def kernel(a):
    return called(a) + CONSTANT
"""


def test_another_source_is_another_digest(tmp_path: Path) -> None:
    """Of the kernel, of a function that it calls, or of a constant; a comment and the place in the file are not."""
    from anomem.kernels.kernel_resources import source_of

    def digest(number: int, source: str) -> str:
        file = tmp_path / f"kernel_{number}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("planted", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_of(module.kernel)

    commented = SOURCE.replace("def called(a):", "def called(a):\n    'What it does.'  # and why")
    changes = (("+ CONSTANT", "- CONSTANT"), ("return a\n", "return a + a\n"), ("constexpr(1)", "constexpr(2)"))
    sources = (SOURCE, commented, *(SOURCE.replace(*change) for change in changes))
    digests = [digest(number, source) for number, source in enumerate(sources)]
    assert digests[0] == digests[1]
    assert len({*digests}) == 4


def test_what_differs_from_its_row_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """And, of the rest, each kernel on each architecture at least once."""
    from anomem.kernels import ahead_of_time

    shipped, sample = ahead_of_time.shipped(), ahead_of_time.sample()
    row = ahead_of_time.Row(128, 0, 0, 4, "none", 0, False, 0)
    rows = {key: row._replace(digest=ahead_of_time.digest_of(spec)) for key, spec in shipped.items()}
    assert ahead_of_time.unlike(rows) == []
    changed, lost = [key for key in shipped if key not in sample][:2]
    rows[changed] = row._replace(digest="of another source")
    del rows[lost]
    assert set(ahead_of_time.unlike(rows)) == {changed, lost}
    places = {(spec.kernel.__name__, spec.architecture) for spec in shipped.values()}
    assert {(shipped[key].kernel.__name__, shipped[key].architecture) for key in sample} == places
    assert len(sample) == len(set(sample)) == max(ahead_of_time.SAMPLE, len(places))

    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(ahead_of_time, "committed_rows", lambda: {ahead_of_time.version(): rows})

    def compile_all(keys: list[str], processes: int) -> dict[str, ahead_of_time.Row]:
        compiled.extend(keys)
        return {}

    monkeypatch.setattr(ahead_of_time, "compile_all", compile_all)
    ahead_of_time.main(["--check"])
    assert set(compiled) == {*sample, changed, lost}
    compiled.clear()
    ahead_of_time.main(["--check", "--all"])
    assert compiled == list(shipped)


def test_the_floor_and_the_present_triton_have_the_same_rows() -> None:
    from anomem.kernels.ahead_of_time import committed_rows
    from anomem.kernels.shipped_kernels import shipped

    rows = committed_rows()
    keys = set(shipped())
    assert set(rows) == {"3.6", "3.8"}
    # Triton before 3.8 is refused on sm_100 and compiles nothing for it.
    assert {key for key in rows["3.8"] if "sm_100" not in key} == set(rows["3.6"])
    assert keys in (set(rows["3.8"]), set(rows["3.6"]))


def test_every_tile_of_the_table_is_compiled_in_every_role() -> None:
    from anomem.kernels.shipped_kernels import ANY_WIDTH, shipped
    from anomem.kernels.tile_table import TABLE, tiles_of

    roles = {
        "retrieve_flash_forward": {"tied", "separate"},
        "retrieve_flash_query_gradient": {"tied", "separate"},
        "retrieve_flash_prototype_sums": {"tied", "keys", "values"},
        "retrieve_resident": {""},
        "retrieve_chunked_weights": {"tied", "separate"},
        "contrast_forward": {"joined", "rectangle"},
        "contrast_backward": {"joined", "rows", "columns"},
        "contrast_chunked_weights": {"joined", "rectangle"},
    }
    fixed = {"contrast_forward": {"joined fixed", "rectangle fixed"}}
    fixed |= {kernel: {"joined fixed"} for kernel in ("contrast_backward", "contrast_chunked_weights")}
    for kernel, kind, block in TABLE:
        wanted = roles[kernel] | fixed.get(kernel, set())
        width = 512 if kernel in ANY_WIDTH else block
        for architecture in {spec.architecture for spec in shipped().values()}:
            brief = architecture in (86, 120)  # the best tile, a tied memory and a learned temperature
            if brief:
                wanted &= {"tied", "joined", "rectangle", "rows", "columns", ""}
            for tile in tiles_of((kernel, kind, block), architecture)[: 1 if brief else None]:
                for role in wanted:
                    key = f"{kernel} {role} {kind} d{width} {tile.rows}x{tile.columns} sm_{architecture}"
                    spec = shipped()[key.replace("  ", " ")]
                    assert (spec.architecture, spec.tile) == (architecture, tile)
                    assert spec.options == tile.options


def test_faults_are_found() -> None:
    from anomem.kernels.ahead_of_time import faults
    from anomem.kernels.kernel_resources import MATRIX_INSTRUCTION, Row
    from anomem.kernels.shipped_kernels import shipped

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
    chained = {name: row._replace(chained=True, digest="another") for name, row in sound.items()}
    on_100 = [key for key in sound if "sm_100" in key]
    assert [fault.partition(":")[0] for fault in faults(chained, sound)] == on_100
    odd = next(key for key in shipped() if key.endswith("sm_90 odd"))  # known where the committed row has it
    serialised = sound | {odd: sound[odd]._replace(serialised=True, digest="another")}
    assert len(list(faults(serialised, sound))) == 1
    assert list(faults(serialised, serialised)) == []
    fewer = sound | {key: sound[key]._replace(blocks=3)}
    assert [fault for fault in faults(fewer, sound) if "committed 4" in fault]
    known = {name: row._replace(digest="same") for name, row in sound.items()}
    (differing,) = faults(known, known | {key: known[key]._replace(registers=126)})
    assert "registers 128, committed 126" in differing
    assert list(faults(known, known | {key: known[key]._replace(registers=126, digest="another")})) == []
    missing = {name: row for name, row in sound.items() if name != key}
    assert list(faults(missing, sound)) == []  # not compiled now
    assert "no longer compiled" in next(faults(sound, sound | {"gone": sound[key]}))
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
    from anomem.kernels.kernel_resources import Loops

    loops = Loops(SASS, matrix_only=True)
    assert loops.spills == 1
    assert loops.multiplications(warps=4) == 4 * 16 * 8 * (16 + 8)
    assert Loops(SASS, matrix_only=False).spills == 3


def test_products_of_one_accumulator_are_found() -> None:
    from anomem.kernels.kernel_resources import chains_products

    one = "%a = tt.dot %x, %y, %zero, inputPrecision = tf32\n%b = tt.dot %p, %q, %arg5 : tensor<64x64xf32>"
    assert not chains_products(one)
    assert chains_products(one + "\n%c_1 = tt.dot %r, %s, %b : tensor<64x64xf32>")


def test_the_tied_sums_have_two_accumulators_on_sm_100() -> None:
    from anomem.kernels.shipped_kernels import shipped

    for key, spec in shipped().items():
        if key.startswith("retrieve_flash_prototype_sums tied"):
            assert spec.constants["TWO_SUMS"] is (spec.architecture == 100), key
