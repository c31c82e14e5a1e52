"""The report of a build: one self-contained HTML page, and one picture of results."""

from edgeglm.report.data import ReportData
from edgeglm.report.page import render_report
from edgeglm.report.picture import results_picture

__all__ = ["ReportData", "render_report", "results_picture"]
