"""The snippets of docs/EXPORT.md load the files in a process that cannot import anomem."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomem.export import FORMATS, Exported
from anomem.scoring import FittedDetector
from tests.train.test_fitting import parts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "EXPORT.md"


@pytest.mark.parametrize("name", FORMATS)
def test_ten_lines_load_a_file_without_anomem(
    exported: Callable[[str], Exported], detector: FittedDetector, name: str
) -> None:
    folder = exported(name).file.parent
    image = parts(1, 2, defect=True)
    Image.fromarray(np.ascontiguousarray(image[0].movedim(0, -1).numpy())).save(folder / "photo.png")
    pattern = rf"<!-- run by tests/export/test_docs.py: {name} -->\n```python\n(.*?)```"
    found = re.search(pattern, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1].count("\n") <= 10
    code = "import sys; sys.modules['anomem'] = None\n" + found[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    (folder / "photo.png").unlink()
    assert done.returncode == 0, done.stderr
    score, p_value, verdict, *_ = done.stdout.split()
    said = detector(image)
    assert float(score) == pytest.approx(float(said.scores[detector.lead]), rel=1e-5)
    assert float(p_value) == pytest.approx(float(said.p_values), rel=1e-6)
    assert verdict == "anomalous"


def test_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    found = re.search(r"test_docs.py: sklearn -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    settings = (
        'alpha=0.1, encoder="efficientnet_lite0", weights="none", scales=("block3",), image_size=64, prototypes=16'
    )
    good, new = (np.ascontiguousarray(x.movedim(1, -1).numpy()) for x in (parts(20), parts(2, 2, defect=True)))
    room = {"good": good, "new": new}
    exec(found[1].replace("alpha=0.1", settings), room)
    assert room["detector"].predict(new).tolist() == [-1, -1]
