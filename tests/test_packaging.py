"""sdist and wheel: what is in them, and that a wheel built from the sdist works where the checkout is not there.

`make test` runs this with the newest torch, `make test-floor` with the oldest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import anomem

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "anomem", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in",
)  # fmt: skip
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
TEN_IMAGES = """
import sys
import numpy as np
from pathlib import Path
from PIL import Image
import anomem
assert Path(anomem.__file__).is_relative_to(sys.argv[1]), anomem.__file__
from anomem.cli import main
source = np.random.default_rng(0)
Path("good").mkdir()
for i in range(10):
    Image.fromarray(source.integers(90, 110, (40, 40, 3), dtype=np.uint8)).save(f"good/{i}.png")
options = ["--encoder=efficientnet_lite0", "--weights=none", "--data.image-size=32", "--fill.prototypes=8"]
options += ["--scales", "block3"]
assert main(["fit", "good", "--alpha=0.2", "--run.directory=run", "--run.device=cpu", "--quiet", *options]) == 0
assert main(["score", "good", "--run", "run", "--output", "scores.csv"]) == 0
assert main(["--version"]) == 0
"""


def built(what: str, folder: Path, source: Path) -> Path:
    """The path of an sdist or a wheel without native code."""
    environment = {**os.environ, "ANOMEM_BUILD": "none"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(folder)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, copy / name)
    return built("sdist", folder, copy)


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from what the sdist holds and nothing else."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (source,) = (sdist.parent / "unpacked").iterdir()
    return built("wheel", sdist.parent, source)


def modules() -> set[str]:
    """Files of the package, as the wheel names them."""
    own = {f"anomem/{path.relative_to(ROOT / 'anomem').as_posix()}" for path in (ROOT / "anomem").rglob("*.py")}
    return own | {f"anomem/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"anomem-{anomem.__version__}.dist-info"
    data = {
        "anomem/py.typed",
        "anomem/gains.json",
        *(f"anomem/report/{name}" for name in ("page.html.jinja", "style.css", "script.js")),
    }
    metadata = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    assert names == modules() | data | metadata | {f"{about}/licenses/LICENSE"}


def test_the_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix != ".json":  # a table of the tests
            assert path.relative_to(ROOT).as_posix() in names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "build"))]


def test_ten_images_with_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    target, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "ANOMEM_CHOICE": "table"}
    done = subprocess.run(
        [sys.executable, "-c", TEN_IMAGES, str(target)], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"anomem {anomem.__version__}"
    assert (work / "scores.csv").read_text().count("\n") == 11


def test_the_changelog_names_the_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None
    assert first[1] == anomem.__version__
