"""The kernel tests run in Triton's interpreter (tests/conftest.py switches it on); this mends it where it is broken.

The tests that compile for real GPUs do so in a subprocess without the interpreter.
"""

from __future__ import annotations

import numpy
import pytest


@pytest.fixture(scope="session", autouse=True)
def ranges_in_the_interpreter() -> None:
    """Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses unless it is 0-dimensional.

    Every range() over a run-time bound would raise TypeError. Triton is imported here, not above: this file is loaded
    before tests/conftest.py can switch the interpreter on.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, *rest: object) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_lang_tensor


@pytest.fixture(autouse=True)
def silent_arithmetic() -> object:
    """The interpreter computes with numpy, which warns where the hardware gives inf and NaN, as in masked rows."""
    with numpy.errstate(all="ignore"):
        yield
