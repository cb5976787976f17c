"""anomem: fused kernels for memory-augmented contrastive anomaly detection (AnoMem).

`anomem.functional` holds the operators, `anomem.nn` the layers, `anomem.reference` the readable specification.
Importing this package loads neither Triton nor the native library; both come with the first call that needs them.
"""

__version__ = "0.2.0"
