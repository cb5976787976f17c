"""What `python -m benchmarks.tune` is made of.

`sweep.py` times every candidate tile of a case's kernels and checks its numbers; `schemes.py` times what is decided
between schemes and not between tiles; `proposal.py` turns the rows into tables and an order for `kernels/tiles.py`.
"""
