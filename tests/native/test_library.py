"""The library itself: it loads once and says what is wrong with its environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anomem.ops import native, sources

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_instruction_set_is_refused() -> None:
    done = run(
        "import torch; from anomem.functional import nt_xent\nnt_xent(*torch.ones(2, 3, 4), impl='native')",
        ANOMEM_CPU="sse9",
    )
    assert done.returncode == 1, done.stderr
    assert 'ANOMEM_CPU: expected baseline, avx2, avx512 or avx512_bf16, received "sse9"' in done.stderr


def test_it_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.obstacle("cpu") is None
    monkeypatch.setattr("torch.ops.load_library", lambda path: pytest.fail("a second load"))
    assert native.obstacle("cpu") is None


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists a library's symbols, is not installed")
def test_it_serves_any_python_and_any_later_torch() -> None:
    """The wheel's tag says so: torch's C functions, whose names stay as they are, and nothing of Python."""
    assert native.obstacle("cpu") is None
    (path,) = (path for path in torch.ops.loaded_libraries if path.endswith("anomem/_C.so"))
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]  # kind and name
    weak = [name for kind, name in symbols if kind == "w" and name.startswith("_ZN2at")]
    assert all("brgemm" in name for name in weak)  # a torch without them is served without them
    names = [name for _, name in symbols if name not in weak]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)] == []


def test_a_folder_without_it_and_an_unknown_device_are_told(tmp_path: Path) -> None:
    done = run("from anomem.ops import native; print(native.obstacle('cpu'))", ANOMEM_LIBRARY=str(tmp_path))
    assert done.stdout.strip() == f"ANOMEM_LIBRARY={tmp_path}: no _C.so in it"
    assert native.obstacle("mps") == "the native library has no kernels for mps tensors"


def test_a_file_that_is_no_library_is_told(tmp_path: Path) -> None:
    digest = sources.digest("_C.so", ROOT)
    assert digest is not None
    (tmp_path / "_C.so").write_bytes(b"not a library, but " + sources.MARK + digest.encode())
    done = run("from anomem.ops import native; print(native.obstacle('cpu'))", ANOMEM_LIBRARY=str(tmp_path))
    assert "_C.so does not load with torch" in done.stdout


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """A folder with the library as other sources would have given it: it loads, and the digest in it is another."""
    (path,) = (Path(path) for path in torch.ops.loaded_libraries if path.endswith("anomem/_C.so"))
    content, digest = path.read_bytes(), sources.built_from(path)
    assert digest is not None
    assert digest == sources.digest("_C.so", ROOT)
    (tmp_path / "_C.so").write_bytes(content.replace(digest.encode(), digest[::-1].encode()))
    return tmp_path


REBUILD = "_C.so was built from other sources than those in csrc: run `make build`"


def test_a_library_of_other_sources_is_not_loaded(stale: Path) -> None:
    call = "import torch\nfrom anomem.functional import nt_xent\nprint(float(nt_xent(*torch.randn(2, 600, 4){})))"
    explicit = run(call.format(", impl='native'"), ANOMEM_LIBRARY=str(stale))
    assert "ArgumentError: `impl`: expected an implementation that can run nt_xent here" in explicit.stderr
    assert REBUILD in explicit.stderr
    auto = run(call.format(""), ANOMEM_LIBRARY=str(stale))
    assert auto.returncode == 0
    assert float(auto.stdout) > 0
    assert auto.stderr.count(REBUILD) == 1  # a warning, once
    environment = run("import anomem.env; anomem.env.main()", ANOMEM_LIBRARY=str(stale), COLUMNS="300")
    assert REBUILD in environment.stdout


def test_a_library_without_sources_beside_it_is_taken_as_it_is(tmp_path: Path) -> None:
    """An installed package has no csrc to compare with."""
    assert sources.digest("_C.so", tmp_path) is None
    (tmp_path / "_C.so").write_bytes(b"")
    assert sources.built_from(tmp_path / "_C.so") is None


def test_a_first_call_without_onednn_leaves_later_ones_alone() -> None:
    """Whether its products run was asked once, and the answer of such a call kept."""
    code = """
import sys, torch
from anomem.functional import hopfield_retrieve
from anomem.ops.conv3x3 import makes_forward
torch.manual_seed(0)
query, prototypes = torch.randn(300, 64), torch.randn(64, 64)
read = lambda dtype: hopfield_retrieve(query.to(dtype), prototypes.to(dtype), impl="native").double().sum().item()
if sys.argv[1] == "off":
    with torch.backends.mkldnn.flags(enabled=False):
        read(torch.float32), read(torch.bfloat16), makes_forward(torch.bfloat16)
print(read(torch.float32).hex(), read(torch.bfloat16).hex(), makes_forward(torch.bfloat16))
"""
    found = []
    for first in ("on", "off"):
        done = subprocess.run([sys.executable, "-c", code, first], cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
