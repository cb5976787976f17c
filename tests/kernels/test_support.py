"""On which GPUs the kernels refuse to run, with the reason, before a launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anomem import kernels, obstacles
from anomem.kernels import contrast_rows, tile_table
from anomem.ops import native

BF16 = torch.bfloat16
Gpu = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Sets what torch and Triton report of the GPU."""

    def report(
        capability: tuple[int, int], *, shared_kib: int = 99, triton: str = "3.8.0", hip: str | None = None
    ) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(kernels.importlib.metadata, "version", lambda package: triton)
        monkeypatch.setattr(tile_table, "_device_properties", lambda device: {"max_shared_mem": shared_kib * 1024})

        forget()

    def forget() -> None:
        for cache in (
            kernels._has_gpu, kernels._gpu_obstacle, tile_table._fitting_gpu, tile_table._architecture_of_gpu,
        ):  # fmt: skip
            cache.cache_clear()

    yield report
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("operator", ["retrieve", "nt_xent", "info_nce"])
def test_supported_gpus(gpu: Gpu, operator: str, capability: tuple[int, int]) -> None:
    """Every operator, dtype and length has tiles in 100 KB of shared memory, or in 228."""
    gpu(capability, shared_kib=227 if capability[0] in (9, 10) else 99)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for features in (8, 64, 100, 128, 256, 1024):
            assert kernels.support(operator, dtype, features) is None


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (6, 1)])
def test_gpus_before_ampere(gpu: Gpu, capability: tuple[int, int]) -> None:
    gpu(capability)
    reason = kernels.support("retrieve", BF16, 64)
    assert reason is not None
    assert "8.0" in reason
    assert "{}.{}".format(*capability) in reason


def test_amd(gpu: Gpu) -> None:
    """A gfx942 reports capability 9.4, which is not Hopper."""
    gpu((9, 4), hip="6.4")
    assert "AMD" in (kernels.support("nt_xent", BF16, 64) or "")


@pytest.mark.parametrize(
    ("release", "refused"), [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("3.10.0", False)]
)
def test_early_triton_on_blackwell(gpu: Gpu, release: str, refused: bool) -> None:
    for capability in ((10, 0), (10, 3)):
        gpu(capability, shared_kib=227, triton=release)
        reason = kernels.support("retrieve", BF16, 64)
        assert (reason is not None) is refused
        assert not refused or release in (reason or "")
    gpu((9, 0), triton=release)
    assert kernels.support("retrieve", BF16, 64) is None


def test_too_little_shared_memory_is_foreseen(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` would raise is an obstacle; retrieval without a tile is chunked."""
    gpu((9, 0), shared_kib=64)
    reason = kernels.support("nt_xent", BF16, 256)
    assert "shared memory" in (reason or "")
    assert kernels.support("nt_xent", BF16, 64) is None
    assert kernels.support("retrieve", BF16, 256) is None
    device = torch.device("cuda", 0)
    owned = torch.empty(1, 4, 256, dtype=BF16, device="meta")
    monkeypatch.setattr(contrast_rows, "fitting", lambda entry, _: tile_table.fitting(entry, device))
    with pytest.raises(RuntimeError, match="shared memory"):
        contrast_rows.plan("contrast_forward", owned)


def test_the_backend_gives_the_reason(gpu: Gpu) -> None:

    gpu((7, 5))
    assert "8.0" in (obstacles.obstacle("retrieve", "triton", "cuda", BF16, 64) or "")


def test_images_of_the_cuda_module() -> None:
    library = Path(native.path_of("_C_cuda.so"))
    if not library.exists():
        pytest.skip("the CUDA module was not built here")
    images = native.images_in(library)
    assert images
    assert any(image.binary for image in images)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_default_images(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup.py` builds sm_80, sm_90 and PTX of compute_90."""
    images = {native.Image(True, 80), native.Image(True, 90), native.Image(False, 90)}
    monkeypatch.setattr(native, "images_in", lambda library: images)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = native._image_obstacle()
    assert (reason is None) is runs
    assert runs or "PTX_90, sm_80, sm_90, none for this GPU's compute capability 7.5" in (reason or "")


def test_without_ptx_a_later_gpu_is_refused() -> None:
    assert not native.Image(True, 90).runs_on((10, 0))
    assert not native.Image(True, 86).runs_on((8, 0))
