"""The stand-in refuses what CUDA refuses, and records faults that CUDA hides. test_stand_in.py runs these cases."""

from __future__ import annotations

import pytest
import torch
import triton

from tests.stand_in.recording import of, recorded

GIB = 2**30
FAILED = "the capture has failed before"  # what ends a capture's block after the call that was refused


@triton.jit
def nothing(x):
    """A kernel."""


def test_a_launch_that_is_too_large() -> None:
    x = torch.zeros(4, device="cuda")
    nothing[(2**31 - 1, 65535)](x)
    with recorded() as entries, pytest.raises(RuntimeError):
        nothing[(1, 65536)](x)
    assert of(entries, "fault")


def test_more_memory_than_there_is() -> None:
    half = torch.empty(40 * GIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(half.numel() + 1, dtype=torch.uint8, device="cuda")


def test_a_host_tensor_for_a_kernel() -> None:
    with pytest.raises(ValueError, match="Pointer argument"):
        nothing[(1,)](torch.zeros(4))


def test_memory_of_another_gpu_for_a_kernel() -> None:
    x = torch.zeros(4, device="cuda:1")
    with recorded() as entries:
        nothing[(1,)](x)
    assert of(entries, "fault")


def test_a_value_read_in_a_capture() -> None:
    x = torch.zeros((), device="cuda")
    with recorded() as entries, pytest.raises(RuntimeError, match=FAILED), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.item()
    assert of(entries, "fault")


def test_a_kernel_first_loaded_in_a_capture() -> None:
    @triton.jit
    def fresh(x):
        """A kernel that no test has launched."""

    x = torch.zeros(4, device="cuda")
    with recorded() as entries, pytest.raises(RuntimeError, match=FAILED), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fresh[(1,)](x)
    assert of(entries, "fault")


def test_waiting_for_work_outside_of_a_capture() -> None:
    event = torch.cuda.Event()
    event.record(torch.cuda.Stream())
    with recorded() as entries, pytest.raises(RuntimeError, match=FAILED), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.current_stream().wait_event(event)
    assert of(entries, "fault")


def test_work_beside_a_capture() -> None:
    x, other = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    with recorded() as entries, torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        with torch.cuda.stream(other):
            x.add_(1)
    assert [e.when for e in of(entries, "launch")][-2:] == ["captured", "now"]
    assert of(entries, "fault")


def fork(x: torch.Tensor, other: torch.cuda.Stream) -> None:
    """Work on another stream that waits for this one."""
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add_(1)


def test_a_fork_that_is_not_joined() -> None:
    x, other = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with recorded() as entries, pytest.raises(RuntimeError, match="not waited for"), torch.cuda.graph(graph):
        fork(x, other)
    assert of(entries, "fault")


def test_a_fork_that_is_joined_is_captured() -> None:
    x, other = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    with recorded() as entries, torch.cuda.graph(torch.cuda.CUDAGraph()):
        fork(x, other)
        torch.cuda.current_stream().wait_stream(other)
    assert of(entries, "launch")[-1].when == "captured"
    assert not of(entries, "fault")


def test_the_null_stream_in_a_capture() -> None:
    with recorded() as entries, pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())
    assert of(entries, "fault")
    with recorded() as entries:
        torch.zeros(4, device="cuda").add_(1)
    assert {e.when for e in of(entries, "launch")} == {"now"}


def test_pinned_memory_is_known_and_pageable_memory_waited_for() -> None:
    pageable = torch.zeros(1024)
    pinned = pageable.pin_memory()
    assert pinned.is_pinned()
    assert not pageable.is_pinned()
    for source, waits in ((pinned, 0), (pageable, 1)):
        with recorded() as entries:
            source.to("cuda", non_blocking=True)
        assert len(of(entries, "wait")) == waits
        assert len(of(entries, "upload")) == 1
