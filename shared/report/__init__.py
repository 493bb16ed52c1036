"""Reports that compare runs, from their records alone: on one page, or in the terminal."""

from shared.report.page import write_report
from shared.report.tables import terminal_table

__all__ = ["terminal_table", "write_report"]
