"""A report of a student: one self-contained page of how good it is, and where it fails."""

from hetkd.report.page import write_report

__all__ = ["write_report"]
