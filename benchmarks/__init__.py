"""Benchmarks: operators × shapes × implementations, measured the same way and kept as rows.

    python -m benchmarks.run --suite kernels      measure, print, write rows
    python -m benchmarks.profile_training         time of a training step by phase
    python -m benchmarks.accuracy                 detection by every score, control and baseline
    python -m benchmarks.counts                   launches and memory on a GPU, counted without one
    python -m benchmarks.tune                     every candidate tile of the Triton kernels, on a GPU
    python -m benchmarks.report                   tables and pictures from benchmarks/results/
    pytest benchmarks/                            the harness as pytest-benchmark sees it

`operators.py` says what is computed and its least work, `rivals/` who computes it, `suites.py` at which sizes;
`harness/` measures it.
"""

import os

# The profiler counts allocations; without this it reports each start and stop on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Read before torch is imported: torch sets a default.
CACHE_GIVEN = "TORCHINDUCTOR_CACHE_DIR" in os.environ
