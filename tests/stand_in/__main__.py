"""Stand-in GPUs: a fake CUDA that records calls, so host-side GPU code is tested without a GPU.

`python -m tests.stand_in ARGUMENTS` is `python ARGUMENTS` with two fake CUDA devices.

A shared library (`device/`) replaces CUDA's runtime, its driver and cuBLAS in a process that is started with it
(LD_PRELOAD). torch's tensors, streams, graphs and allocator, Triton's compiler and launcher and the native library run
unchanged. Memory is the host's. A kernel adds an entry to a log and computes nothing. Known refusals of CUDA are
refused: grids, blocks and dynamic shared memory that are too large, too much memory, calls that a capture forbids.

Seen here: launches, their sizes, streams and devices, CUDA graphs, memory, waiting. Not seen: what kernels compute
(Triton's interpreter in tests/kernels, the host emulation in tests/cuda, a GPU) and how long they take.

There is no cuDNN: code that convolves sets `torch.backends.cudnn.enabled = False`.
"""

from __future__ import annotations

import sys

from tests.stand_in.start import start

if __name__ == "__main__":
    start(*sys.argv[1:])
