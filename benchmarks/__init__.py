"""Benchmarks: operators × shapes × implementations, measured the same way and kept as rows.

    python -m benchmarks.run --suite kernels      measure, print, write rows
    python -m benchmarks.profile_training         time of a training step by phase
    python -m benchmarks.tune                     every candidate tile of the Triton kernels, on a GPU
    python -m benchmarks.report                   tables and pictures from benchmarks/results/
    pytest benchmarks/                            the smoke cases under pytest-benchmark

`operators/` says what is computed and how much work that is at least, `rivals/` who computes it, `suites.py` at which
sizes. `prepare.py` checks an implementation against float64 before it times it.
"""

import os

# The profiler, which counts allocations, otherwise reports on standard error that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Read before torch is imported, which puts its default there.
CACHE_GIVEN = "TORCHINDUCTOR_CACHE_DIR" in os.environ
