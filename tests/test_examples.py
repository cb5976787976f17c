"""Every example runs and does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from anomem.train import fit, save_detector
from tests.train.test_fitting import CONFIG, parts, write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_complete() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f"`{file.name}`" in listed
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 100, "under two screens"


def test_your_folder(tmp_path: Path) -> None:
    save_detector(fit(parts(24), alpha=0.1, config=CONFIG), tmp_path / "out" / "detector")  # small, random weights
    new = write(tmp_path / "new", parts(3, 2, defect=True))
    assert example("your_folder").main(tmp_path / "good", new, tmp_path / "out") == 3
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"00.png", "01.png", "02.png"}


def test_simclr() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    assert example("simclr").main(steps=60) > 0.6


def test_new_kernel(interpreter: None) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    assert example("new_kernel").main() < 1e-5


def test_many_machines(tmp_path: Path) -> None:
    module = example("many_machines")
    save_detector(fit(parts(24), alpha=0.1, config=CONFIG), tmp_path / "run")
    files = sorted(
        [*write(tmp_path / "good", parts(5, 1)).iterdir(), *write(tmp_path / "bad", parts(2, 2, True)).iterdir()]
    )
    (tmp_path / "list").write_text("\n".join(map(str, files)) + "\n")
    shards = [list(module.shard(tmp_path / "list", i, 2, 3)) for i in range(2)]
    assert sorted(number for of in shards for number, _ in of) == [0, 1, 2]
    assert sorted(name for of in shards for _, names in of for name in names) == sorted(map(str, files))
    output = tmp_path / "out"
    assert [module.score(tmp_path / "run", tmp_path / "list", output, i, 2, 3) for i in range(2)] == [2, 1]
    assert module.score(tmp_path / "run", tmp_path / "list", output, 0, 2, 3) == 0, "what is there is not scored again"
    worst = module.join(output, 2)
    assert {Path(path).parent.name for _, path in worst} == {"bad"}
