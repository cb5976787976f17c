"""Accuracy: detection on real images by every score, control and baseline, kept as rows.

    python -m benchmarks.accuracy                what benchmarks/results/accuracy.jsonl does not hold yet, then tables
    python -m benchmarks.accuracy --table-only   the tables of what is there

`settings.py` says what is trained or fitted, `tasks.py` on which images, `rows.py` how results are kept, `tables.py`
what people read, the goals among them.
"""
