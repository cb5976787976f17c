"""One HTML file about a run: figures, decision, curves, images, prototypes, training."""

from anomem.report.numbers import alpha_at, bootstrap_interval, confusion, start_threshold
from anomem.report.page import report_run

__all__ = ["alpha_at", "bootstrap_interval", "confusion", "report_run", "start_threshold"]
