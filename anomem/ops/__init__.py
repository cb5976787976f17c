"""Operator schemas, fakes and autograd: the one boundary between anomem's functions and its kernels.

Every pass of every operator is one registered operator `anomem::<backend>_<operator>_<fwd|bwd>`; an autograd function
around each pair adds the gradient. Kernels are imported, and the native library loaded, inside the device functions
only, so importing this package costs a few schema registrations.
"""
