"""Launches of kernels: in a CUDA graph, on the right GPU and stream, without waiting. test_stand_in.py runs these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.nvidia.driver import CudaLauncher

from anomem import functional as AF
from anomem import nn as ann
from tests.stand_in.calls import CALLS, TRITON, Call
from tests.stand_in.recording import Entry, of, recorded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # which have schemes of their own
HOST = ("wait", "upload", "download")


def work_of(entries: list[Entry], when: str = "now") -> list[tuple[Any, ...]]:
    """The work of all streams: kernels with their launch sizes, copies and fills."""
    work = of(entries, "launch", "copy", "fill")
    return [(e.kind, e.what, e.grid, e.block, e.bytes) for e in work if e.when == when]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_cuda_graph_captures_all_of_a_call(name: str, dtype: torch.dtype) -> None:
    """The graph holds the kernels of an ordinary call, and none ran beside it or waited for the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call = Call(*CALLS[name], dtype)
        call()
        with recorded() as eager:
            call()
    graph = torch.cuda.CUDAGraph()
    with recorded() as captured, torch.cuda.graph(graph, stream=side):
        call()
    work = work_of(captured, "captured")
    assert work
    assert work == work_of(eager)
    # Before it begins torch waits for the GPU and, in some releases, sets the state of its random numbers.
    first = next(i for i, e in enumerate(captured) if e.when == "captured")
    assert not work_of(captured[first:], "now")
    assert not of(captured[first:], "fault", *HOST)
    for _ in range(2):
        with recorded() as replayed:
            graph.replay()
        assert work_of(replayed, "replayed") == work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_a_bound_launch_passes_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch_kernel` of `anomem.kernels` runs a kernel that Triton found before with Triton's arguments."""
    from anomem.kernels import launching, passes

    monkeypatch.setattr(passes, "key_of", lambda function, args: None)  # repeated passes: pass_cases.py
    launch, passed = CudaLauncher.__call__, []

    def record(self: Any, *arguments: Any) -> Any:
        grid, function, rest = arguments[:3], arguments[4], arguments[9:]
        shown = [(x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in rest]
        passed.append((grid, function, shown))
        return launch(self, *arguments)

    call = Call(*TRITON[name], dtype)
    call()
    monkeypatch.setattr(CudaLauncher, "__call__", record)
    call()
    bound = passed.copy()
    passed.clear()
    monkeypatch.setattr(launching, "_bound", {})
    call()
    assert bound
    assert bound == passed


@pytest.mark.parametrize("rows", [304, 303], ids=["a multiple of 16", "odd"])
@pytest.mark.parametrize("name", TRITON)
def test_a_capture_at_a_new_number_of_rows_compiles_nothing(name: str, rows: int) -> None:
    """A kernel that were compiled anew for counts that divide by 16, or do not, would be loaded in the capture."""
    function, shapes = TRITON[name]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        Call(function, shapes, torch.bfloat16)()
        # Groups, features and the size of a memory stay.
        fixed = 1 if name.startswith(("retrieve", "read", "nearest")) else len(shapes)
        changed = [(*shape[:-2], shape[-2] + rows - 300, shape[-1]) if shape else () for shape in shapes[:fixed]]
        changed += shapes[fixed:]
        other = Call(function, changed, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with recorded() as entries, torch.cuda.graph(graph, stream=side):
        other()
    assert not of(entries, "fault")


@pytest.mark.parametrize(
    ("allowed", "kernel"), [(True, "retrieve_flash_forward_kernel"), (False, "retrieve_chunked_softmax_kernel")]
)
def test_float32_takes_the_flash_kernels_where_torch_allows_tf32(allowed: bool, kernel: str) -> None:
    """Without TF32 no matrix instruction takes float32, so cuBLAS multiplies."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        call = Call(*CALLS["retrieve"], torch.float32)
        with recorded() as entries:
            call()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert kernel in {e.what for e in of(entries, "launch")}
    assert not of(entries, "fault")


def test_modules_become_graphed_callables() -> None:
    memory = ann.HopfieldMemory(64, 40, impl="triton").cuda()
    query = torch.zeros(300, 64, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(memory, (query,))
    with recorded() as entries:
        graphed(query).sum().backward()
    replayed = {e.what for e in of(entries, "launch") if e.when == "replayed"}
    assert {
        "retrieve_chunked_softmax_kernel",
        "retrieve_chunked_softmax_backward_kernel",
        "row_normalize_backward_kernel",
    } <= replayed
    assert not of(entries, "fault", *HOST)


def test_a_compiled_step_replays_a_graph() -> None:
    """`mode="reduce-overhead"`, with no break in the graph."""
    memory = ann.HopfieldMemory(64, 40, impl="triton").cuda()

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def step(z: torch.Tensor, z_pair: torch.Tensor) -> torch.Tensor:
        return AF.nt_xent(memory(z), z_pair, impl="triton")

    for _ in range(4):  # the first calls compile, warm up and capture
        memory.zero_grad()
        views = [torch.zeros(300, 64, device="cuda", requires_grad=True) for _ in range(2)]
        with recorded() as entries:
            step(*views).backward()
    replayed = {e.what for e in of(entries, "launch") if e.when == "replayed"}
    assert {
        "retrieve_chunked_softmax_kernel",
        "retrieve_chunked_softmax_backward_kernel",
        "contrast_forward_kernel",
        "contrast_chunked_weights_kernel",
    } <= replayed
    assert not of(entries, "fault", *HOST)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    call = Call(*CALLS[name], dtype)
    call()
    with recorded() as entries:
        call()
    assert of(entries, "launch")
    assert not of(entries, "fault", "allocate", *HOST)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_run_on_the_gpu_of_their_tensors(name: str, dtype: torch.dtype) -> None:
    with recorded() as entries:
        Call(*CALLS[name], dtype, "cuda:1")()
    assert {e.device for e in of(entries, "launch")} == {1}
    assert not of(entries, "fault")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_run_on_the_current_stream(name: str, dtype: torch.dtype) -> None:
    call = Call(*CALLS[name], dtype)
    torch.cuda.synchronize()
    with recorded() as entries, torch.cuda.stream(torch.cuda.Stream()):
        call()
    streams = {e.stream for e in of(entries, "launch")}
    assert len(streams) == 1
    assert streams != {0}
