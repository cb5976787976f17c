"""Settings of the whole suite.

Triton kernels run in Triton's interpreter, on CPU tensors, except under `-m gpu`. The interpreter must be switched on
before anything imports triton, as torch.compile does and the conftest.py of a folder may: hence the first statement.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# No measurement and no file of this machine: every run of the suite makes the same choices.
os.environ["ANOMEM_CHOICE"] = "table"
# The native library fills memory that it hands to a kernel with NaN, so that a value nobody wrote is seen.
os.environ["ANOMEM_POISON"] = "1"

SWITCHED_ON_HERE = "TRITON_INTERPRET" not in os.environ and "triton" not in sys.modules
if SWITCHED_ON_HERE:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Under `-m gpu` the kernels are compiled."""
    if config.getoption("markexpr") == "gpu" and SWITCHED_ON_HERE:
        if "triton" in sys.modules:
            raise pytest.UsageError("triton was imported with its interpreter on: set TRITON_INTERPRET=0")
        del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA GPU and say so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """The same for the tensors that torch allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_choices() -> Iterator[None]:
    """A test that replaces kernels, rules or files leaves no choice behind."""
    yield
    backends = sys.modules.get("anomem.backends")
    if backends is not None:
        backends.forget()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What a test that counts memory in use needs: how many threads hold theirs at once is chance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranges_in_the_interpreter() -> None:
    """Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses unless it is 0-dimensional.

    Every range() over a run-time bound would raise TypeError.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, *rest: object) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_lang_tensor


@pytest.fixture
def interpreter(ranges_in_the_interpreter: None) -> Iterator[None]:
    """What a test that runs kernels in the interpreter needs.

    The interpreter computes with numpy, which warns where the hardware gives inf and NaN, as in masked rows.
    """
    with numpy.errstate(all="ignore"):
        yield
