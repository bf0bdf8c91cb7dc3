"""The report: one HTML file that says what was trained, what came of it, and shows it."""

from vlscale.report.runs import RunReport, load_metrics
from vlscale.report.write import write_report

__all__ = ["RunReport", "load_metrics", "write_report"]
