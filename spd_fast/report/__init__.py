"""Reports: figures, a self-contained page, the results table, the model card."""

from spd_fast.report.page import write_report
from spd_fast.report.table import results_table, seeds_summary

__all__ = ["results_table", "seeds_summary", "write_report"]
