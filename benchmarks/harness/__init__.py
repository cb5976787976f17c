"""How operators are measured and kept as rows.

`case.py` has the words, `rows.py` the rows. `measure.py` measures seconds, bytes and ceilings of any call, `prepare.py`
checks an implementation against float64 and warms it up, `runner.py` measures the cases of a suite, `base.py` measures
another revision beside the working tree.
"""
