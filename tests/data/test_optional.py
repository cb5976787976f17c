"""A missing optional package is told in one sentence."""

from __future__ import annotations

import sys

import pytest

from anomem.data import DataConfig, load_task
from anomem.errors import UserError


@pytest.mark.parametrize(
    ("dataset", "module", "package"),
    [("digits", "sklearn.datasets", "sklearn"), ("textures", "skimage", "skimage")],
)
def test_missing_package(dataset: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"the data set {dataset} needs the package {package}.*pip install anomem"):
        load_task(DataConfig(dataset))
