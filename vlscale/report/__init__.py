"""The report: one HTML file that says what was trained, what came of it, and shows it."""

from vlscale.report.runs import RunReport, load_metrics
from vlscale.report.study import read_study, study_of
from vlscale.report.write import write_report, write_study_page

__all__ = ["RunReport", "load_metrics", "read_study", "study_of", "write_report", "write_study_page"]
