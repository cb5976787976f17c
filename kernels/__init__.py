"""Triton kernels of anomem: one file per operator, shared tile helpers, one table of tile sizes.

This folder is installed as `anomem.kernels`; it imports torch and triton and nothing of `anomem`.
"""

if __name__ != "anomem.kernels":
    raise ImportError("import anomem.kernels, not kernels: the folder is installed under the package's name")
