"""Accuracy: detection on real images by every score, control and baseline, kept as rows.

    python -m benchmarks.accuracy                run the jobs missing in benchmarks/results/accuracy.jsonl, print tables
    python -m benchmarks.accuracy --table-only   print the tables

`settings.py` says what is trained or fitted on which images; the tables are those of `benchmarks/report/accuracy.py`.
"""
