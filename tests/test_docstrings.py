"""The examples of docstrings that state their output give it."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from anomem.models.pretrained import pretrained_available

MODULES = (
    "functional.contrast", "functional.deviation_map", "functional.memory_loss", "functional.nearest",
    "functional.read", "functional.retrieve", "functional.sampling", "functional.usage", "models.model",
    "models.pretrained", "models.tiled", "data.task",
)  # fmt: skip
NEED_WEIGHTS = ("models.pretrained", "models.tiled")


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_right(module: str) -> None:
    if module in NEED_WEIGHTS and not pretrained_available():
        pytest.skip("needs the weights of the extra `pretrained`")
    names = {"torch": torch}
    for part in ("data", "models", "models.pretrained"):
        names |= vars(importlib.import_module(f"anomem.{part}"))
    found = importlib.import_module(f"anomem.{module}")
    names |= vars(found)
    examples = [test for test in doctest.DocTestFinder().find(found, module, globs=names) if test.examples]
    assert examples
    said: list[str] = []
    for test in examples:
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
