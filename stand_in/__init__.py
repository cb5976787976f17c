"""GPUs that are not there, for what can be seen without a kernel computing anything.

A shared library takes the place of CUDA's runtime, of its driver and of cuBLAS in a process that is started with it
(LD_PRELOAD). There torch has two CUDA devices with tensors, streams, graphs and its allocator, Triton compiles and
launches, and the native library does. Memory is the host's; a kernel leaves an entry in a log and does nothing else.
What CUDA refuses is refused as far as it is known here: grids, blocks and dynamic shared memory that are too large,
memory that is not there, what a capture forbids.

So the way from a call to its kernels runs for real: launches, their sizes, streams and devices, CUDA graphs, memory,
waiting. What kernels compute and how long they take is not seen. For that there are Triton's interpreter
(tests/kernels), the emulation (tests/cuda) and, where there is one, a GPU.

`python -m stand_in ARGUMENTS` is `python ARGUMENTS` on such GPUs. There is no cuDNN: what convolves sets
`torch.backends.cudnn.enabled = False`.
"""
